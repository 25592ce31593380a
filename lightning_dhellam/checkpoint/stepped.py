"""The state of an optimizer as all ranks have it together, and what one rank takes of it.

Tensors of the shape of their parameters, master weights among them, are cut as those are. What else
an optimizer keeps of a parameter is the same on all ranks that have a part, such as a number of
steps, or cannot be cut: then it is for the same sizes only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_dhellam.checkpoint.pieces import Pieces, empty_place
from lightning_dhellam.checkpoint.shares import Share, Shares
from lightning_dhellam.parallel.optimizer_state import UNNAMED, Form, same

PREFIX = "optimizer/"
"""Before the names of what an optimizer keeps."""
MASTER = "master_weight"
"""What a master weight is called among what is kept of a parameter."""
_ALIKE = "alike"
"""Where what all ranks have together has plain values of parameters."""


@dataclass
class Saved:
    """What a rank saves of its optimizer.

    Attributes:
        tensors: that are cut as their parameters are.
        rest: what is the same on all ranks that have it: groups, and by parameter plain values.
        own: what only this rank has.
    """

    tensors: dict[str, Pieces] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


def to_save(state: Mapping[str, Any], shares: Shares) -> Saved:
    """What a rank saves of `ModelParallelOptimizer.state_dict`."""
    saved, values = Saved(), {}
    for name, kinds in state["state"].items():
        share, part, plain = shares[name], state["parts"].get(name), {}
        for key, value in kinds.items():
            if _is_cut(value, share, part):
                if share.counts:
                    saved.tensors[_at(key, name)] = _pieces(share, value, part)
            elif isinstance(value, Tensor) and value.dim() and share.axis is not None:
                saved.own.setdefault(name, {})[key] = value
            else:
                plain[key] = value
        values[name] = plain
    for name, master in state["master_weights"].items():
        if shares[name].counts:
            part = state["parts"].get(name)
            saved.tensors[_at(MASTER, name)] = _pieces(shares[name], master, part)
    saved.rest = {
        "groups": state["groups"],
        "values": values,
        "other": state["other"],
        "alone": [f"'{key}' of '{name}'" for name, kinds in saved.own.items() for key in kinds],
    }
    return saved


def _at(key: str, name: str) -> str:
    return f"{PREFIX}{key}/{name}"


def split_place(place: str) -> tuple[str, str]:
    """What a tensor is of a parameter's state, and the parameter's name, of where it is saved."""
    key, _, name = place.removeprefix(PREFIX).partition("/")
    return key, name


def _is_cut(value: Any, share: Share, part: Sequence[int] | None) -> bool:
    if not isinstance(value, Tensor) or not value.dim():
        return False
    return part is not None or tuple(value.shape) == share.local


def _pieces(share: Share, value: Tensor, part: Sequence[int] | None) -> Pieces:
    return Pieces(share.shape, value.dtype, share.pieces(value, part))


def merged(rests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all ranks have together, of what each of them has in `Saved.rest`."""
    values: dict[str, Any] = {}
    other: dict[str, Any] = {}
    for rest in rests:
        values |= rest["values"]
        other = {**rest["other"], **other}
    return {
        "groups": _groups([rest["groups"] for rest in rests]),
        _ALIKE: _alike(values),
        "other": other,
        "alone": [name for rest in rests for name in rest["alone"]],
    }


def _alike(values: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain values of parameters, once for those that follow each other and have the same.

    As a rule all have: a number of steps. A hundred tensors of one number take as long to read as
    a tenth of a GB.
    """
    found: list[dict[str, Any]] = []
    for name, own in values.items():
        if not found or not _are_identical(found[-1]["values"], own):
            found.append({"names": [], "values": own})
        found[-1]["names"].append(name)
    return found


def _are_identical(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def kind(value: Any) -> Any:
        return (value.dtype, value.shape) if isinstance(value, Tensor) else type(value)

    return [*a] == [*b] and all(kind(a[k]) == kind(b[k]) and same(a[k], b[k]) for k in a)


def values_of(rest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Plain values by parameter, each with its own, of what all ranks have together."""
    if _ALIKE not in rest:  # as it was before
        return {name: dict(own) for name, own in rest["values"].items()}
    return {name: deepcopy(one["values"]) for one in rest[_ALIKE] for name in one["names"]}


def _groups(of_ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Groups of all ranks: those of one number and the same settings are one."""
    found: dict[int, list[dict[str, Any]]] = {}
    for groups in of_ranks:
        for number, group in enumerate(groups):
            alike = found.setdefault(number, [])
            one = next((other for other in alike if _are_alike(other, group)), None)
            if one is None:
                one = {**group, "names": {}}
                alike.append(one)
            one["names"] |= dict.fromkeys(group["names"])
    merged_groups = [group for number in sorted(found) for group in found[number]]
    return [{**group, "names": list(group["names"])} for group in merged_groups]


def _are_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "names")


def to_load(
    metadata: Mapping[str, Any], shares: Shares, form: Form
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Pieces]]:
    """Where to read what this rank steps: by parameter and key tensors, and their pieces."""
    state: dict[str, dict[str, Tensor]] = {}
    pieces: dict[str, Pieces] = {}
    wanted = set(form.stepped)
    for place, saved in metadata.items():
        if not place.startswith(PREFIX) or not isinstance(saved, TensorStorageMetadata):
            continue
        key, name = split_place(place)
        if name not in wanted or (key == MASTER and not form.masters):
            continue
        share, part = shares[name], form.parts.get(name)
        shape = share.local if part is None else (part[1] - part[0],)
        state.setdefault(name, {})[key] = whole = empty_place(shape, saved.properties.dtype)
        rows = saved.size[0] if share.rows is not None else None
        pieces[place] = Pieces(saved.size, whole.dtype, share.pieces(whole, part, rows))
    return state, pieces


def of_rank(
    rest: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Mapping[str, Any]],
    shares: Shares,
    form: Form,
) -> dict[str, Any]:
    """What `ModelParallelOptimizer.load_state_dict` takes on this rank.

    Args:
        rest: what all ranks have together.
        tensors: what was read of the tensors, by parameter.
        own: what this rank has had alone, if the sizes are the same.
        shares: of this rank's parameters.
        form: of this run's optimizer.
    """
    values: dict[str, dict[str, Any]] = {}
    saved = values_of(rest)
    for name in (*form.stepped, *(n for n in saved if n in shares)):
        # Of what is frozen now only the name matters: there is no place for its state.
        mine = name in form.stepped
        if name in values or (not mine and name in form.trained):
            continue
        read = {k: v for k, v in tensors.get(name, {}).items() if k != MASTER}
        found = {**saved.get(name, {}), **read, **own.get(name, {})}
        if found or not mine:
            values[name] = found
    return {
        "groups": [
            {**group, "names": [n for n in group["names"] if n in shares or n.startswith(UNNAMED)]}
            for group in rest["groups"]
        ],
        "state": values,
        "other": rest["other"],
        "master_weights": {
            name: kinds[MASTER] for name, kinds in tensors.items() if MASTER in kinds
        },
        "parts": form.parts,
    }
