"""What one rank takes of a checkpoint that one of Lightning's own strategies has saved: a file.

It has whole tensors. Each rank leaves them in the file and reads its own part. Parameters have
numbers there, as `configure_optimizers` was given them; ranks know together which these are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.checkpoint import content
from lightning_dhellam.checkpoint.description import ABOUT, FROM, weights_only
from lightning_dhellam.checkpoint.order import in_order
from lightning_dhellam.checkpoint.shares import Share, Shares, shares_of
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.parallel.optimizer_state import Form
from lightning_dhellam.remote import Folder

NAMES = "names"
"""Where a parameter group has the names of its parameters, if a file of ours was its origin."""
_STATE = "optimizer_states"
_NOT_SETTINGS = ("params", "param_names", NAMES)


def load(
    path: Folder, shares: Shares, elsewhere: Collection[str], *, with_state: bool
) -> dict[str, Any]:
    """What a rank takes of a file: all but the parts that others have of its `state_dict`.

    Args:
        path: of the file.
        shares: how this rank's parameters lie.
        elsewhere: names that only other ranks have.
        with_state: whether training goes on, so that there must be the state of an optimizer.

    Raises:
        ValueError: it is damaged, no checkpoint of Lightning's, or has no such state.
    """
    found = content.read(path, mapped=True)
    if not isinstance(found.get("state_dict"), Mapping):
        raise ValueError(f"{path} is no checkpoint of Lightning's: it has no state_dict")
    states = found.pop(_STATE, None)
    if with_state:
        if not states:
            raise ValueError(weights_only(path))
        if len(states) > 1:
            raise ValueError(
                f"checkpoint {path} is of {len(states)} optimizers, and DHellamStrategy has one:"
                " start a new run from its weights"
            )
        found[_STATE] = [{FROM: str(path)}]
    weights = found.pop("state_dict")
    found.pop(ABOUT, None)
    own = {n: part_of(value, shares.get(n)) for n, value in weights.items() if n not in elsewhere}
    return {**found, "state_dict": own}


def part_of(whole: Any, share: Share | None, part: Sequence[int] | None = None) -> Any:
    """A copy of a rank's part of a whole parameter; of all else the whole.

    Args:
        whole: the parameter, or what lies as it does.
        share: how it lies; None if every rank has all of it.
        part: the first element of the rank's part that is wanted, and the one after the last.
    """
    if not isinstance(whole, Tensor):
        return whole
    if share is None or not share.fits(tuple(whole.shape)):
        return whole.clone()
    shape = share.local if part is None else (part[1] - part[0],)
    found = torch.zeros(shape, dtype=whole.dtype)
    rows = whole.shape[0] if share.rows is not None else None
    for start, view in share.pieces(found, part, rows):
        places = tuple(slice(a, a + n) for a, n in zip(start, view.shape, strict=True))
        view.copy_(whole[places])
    return found


def take_part(model: CausalLM, whole: CausalLM) -> None:
    """Give a rank's part of a model the weights of a whole one, and let it be frozen as that is."""
    names, shares = ExpertNames(model), shares_of(model, model.context.topology)
    of_all, own = whole.state_dict(), model.state_dict()
    parts = {n: part_of(of_all[names.of_all(n)], shares.get(names.of_all(n))) for n in own}
    model.load_state_dict(parts)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names.of_all(name) in trained)
    model.origin = whole.origin


def load_state(
    path: Folder, context: ParallelContext, shares: Shares, form: Form
) -> dict[str, Any]:
    """What `ModelParallelOptimizer.load_state_dict` takes on this rank. Every rank must call this.

    Raises:
        ValueError: the optimizer was given other numbers of parameters, or has something that
            cannot be cut.
    """
    of_ranks = of_all_ranks(form.groups, context.world_group)
    found = content.read(path, mapped=True)
    (saved,) = found[_STATE]
    names = _names(saved["param_groups"], [_merged(each) for each in zip(*of_ranks, strict=True)])
    values: dict[str, dict[str, Any]] = {}
    for number, kinds in saved["state"].items():
        name = names.get(number)
        if name is None or name not in shares:
            continue
        # Of what is frozen now only the name matters: there is no place for its state.
        if name in form.stepped or name not in form.trained:
            of_it = kinds if name in form.stepped else {}
            values[name] = {k: _own(k, name, v, shares, form, context) for k, v in of_it.items()}
    masters = {
        n: part_of(found["state_dict"][n].float(), shares[n], form.parts.get(n))
        for n in (form.stepped if form.masters else ())
        if n in found["state_dict"]
    }
    groups = [
        {
            **{k: v for k, v in group.items() if k not in _NOT_SETTINGS},
            NAMES: [n for n in (names[i] for i in group["params"]) if n in shares],
        }
        for group in saved["param_groups"]
    ]
    other = {k: v for k, v in saved["state"].items() if not isinstance(k, int)}
    return {
        "groups": groups,
        "state": values,
        "other": other,
        "master_weights": masters,
        "parts": form.parts,
    }


def _merged(of_ranks: Sequence[Sequence[str]]) -> list[str]:
    """The names of a group of all ranks together, in the order in which one process has them."""
    if all(names == of_ranks[0] for names in of_ranks):
        return list(of_ranks[0])
    return in_order([*chain.from_iterable(of_ranks)])


def _names(groups: Sequence[Mapping[str, Any]], of_run: Sequence[Sequence[str]]) -> dict[int, str]:
    """The names of parameters by their numbers in a file."""
    if not all(NAMES in group for group in groups):
        sizes, own = (
            [len(each) for each in one] for one in ([g["params"] for g in groups], of_run)
        )
        if sizes != own:
            raise ValueError(
                f"the checkpoint's optimizer has parameter groups of {sizes} parameters, this run's"
                f" of {own}: a checkpoint of another strategy names no parameters, so"
                " configure_optimizers must make the same groups in the same order"
            )
        return {
            number: name
            for group, names in zip(groups, of_run, strict=True)
            for number, name in zip(group["params"], names, strict=True)
        }
    return {
        number: name
        for group in groups
        for number, name in zip(group["params"], group[NAMES], strict=True)
    }


def _own(
    key: str, name: str, value: Any, shares: Shares, form: Form, context: ParallelContext
) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value.clone() if isinstance(value, Tensor) else value
    if shares[name].fits(tuple(value.shape)):
        return part_of(value, shares[name], form.parts.get(name))
    if context.topology.world_size == 1:
        return value.clone()
    raise ValueError(
        f"'{key}' of '{name}' has another shape than its parameter, so it cannot be cut: go on in"
        " one process, or start a new run from the weights"
    )
