"""The state of an optimizer by the names of parameters: how it is saved, and who takes what of it.

    groups          of every parameter group the names of its parameters, and its settings
    state           by parameter, this rank's part of its state
    master_weights  by parameter, this rank's part of it in fp32, where there are any
    parts           by parameter, from which to which element a part is, where there are parts

Torch's own form has numbers for names, so that a group or a parameter that has moved would take
the state of another.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

UNNAMED = "parameter "
"""Before the number of what is stepped and is no parameter of the model."""
RESUME_SETTINGS = ("checkpoint", "arguments")
_HOW = ("foreach", "fused", "capturable", "differentiable")
"""How an optimizer computes on this machine: another one may do it otherwise."""
_NOT_TAKEN = ("params", "param_names", "names", *_HOW)
_NOT_CHOSEN = (*_NOT_TAKEN, "initial_lr", "is_expert_parallel")


@dataclass(frozen=True)
class Names:
    """The names of what an optimizer steps.

    Attributes:
        own: of each group the names of what it steps on this rank, in its order.
        groups: of each group all names, also of what other ranks step.
    """

    own: Sequence[Sequence[str]]
    groups: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Form:
    """What the optimizer of a rank has the state of.

    Attributes:
        stepped: names of the parameters of which it has a part.
        trained: names of the parameters that are trained, whoever has a part.
        parts: of which elements of a parameter it has the state; none if of all.
        masters: whether there are master weights.
        groups: of each parameter group the names that it was given, also of what rests.
    """

    stepped: Sequence[str]
    trained: Collection[str]
    parts: Mapping[str, Sequence[int]]
    masters: bool
    groups: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Override:
    """A setting in which the checkpoint and this run differ.

    Attributes:
        name: of the setting.
        saved: what the checkpoint has.
        given: what this run was given.
        groups: numbers of the parameter groups that it is of; none if it is of all, or of none.
    """

    name: str
    saved: Any
    given: Any
    groups: tuple[int, ...] = ()

    def said(self, resume_settings: str) -> str:
        """The setting and both values, and which of them wins, in a line."""
        some = ", ".join(map(str, self.groups))
        where = f"{self.name} of parameter group {some}" if some else self.name
        saved, given = f"{self.saved}, as in the checkpoint", f"{self.given}, as this run was given"
        if resume_settings == "arguments":
            return f"{where}: {given}, not {saved}"
        return f"{where}: {saved}, not {given}; with resume_settings='arguments' this run's wins"


@dataclass(frozen=True)
class Restored:
    """What an optimizer has taken of a checkpoint.

    Attributes:
        order: for each group of this run, the number of the one in the checkpoint; None where the
            checkpoint has no such group, whose settings are then those of this run.
        overrides: settings that differ.
        rates: learning rate of each group as the checkpoint has it; None as above.
        initial_rates: the same before any scheduler.
    """

    order: tuple[int | None, ...]
    overrides: tuple[Override, ...]
    rates: tuple[float | None, ...]
    initial_rates: tuple[float | None, ...]


def named(state: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """What `Optimizer.state_dict` returned, with names for its numbers."""
    flat = list(chain.from_iterable(names.own))
    groups = [
        {"names": list(of_group), **_without(group, _NOT_TAKEN)}
        for group, of_group in zip(state["param_groups"], names.groups, strict=True)
    ]
    found: dict[str, Any] = {"groups": groups, "state": {}, "other": {}}
    for key, value in state["state"].items():
        if isinstance(key, int):
            found["state"][flat[key]] = value
        else:
            found["other"][key] = value
    return found


def from_numbers(saved: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """State that version 0.1 has saved, which is by position, with the names of this run.

    Raises:
        ValueError: there are other numbers of groups or parameters.
    """
    state = saved["optimizer"]
    sizes = [len(group["params"]) for group in state["param_groups"]]
    own = [len(group) for group in names.own]
    if sizes != own:
        raise ValueError(
            f"the checkpoint's optimizer has parameter groups of {sizes} parameters, this run's of"
            f" {own}: a checkpoint of version 0.1 names no parameters, so configure_optimizers must"
            " make the same groups in the same order"
        )
    masters = zip(chain.from_iterable(names.own), saved["master_weights"], strict=False)
    return {**named(state, names), "master_weights": dict(masters)}


def restore(
    optimizer: Optimizer, saved: Mapping[str, Any], names: Names, resume_settings: str
) -> Restored:
    """Load a named state into `optimizer`: each parameter's own, and each group's by its names.

    Args:
        optimizer: to be loaded.
        saved: as `named` makes it.
        names: of what `optimizer` steps.
        resume_settings: whose settings win where they differ: those of the `checkpoint`, or the
            `arguments` that this run's optimizer was made with.

    Raises:
        ValueError: a parameter or a group is not in both.
    """
    own = optimizer.state_dict()
    _check_parameters(saved, names)
    order = _matched(saved["groups"], names.groups, must=resume_settings == "checkpoint")
    chosen = _chosen(optimizer)
    groups = []
    found: dict[tuple[str, str, str], list[int]] = {}
    overrides: list[Override] = []
    for number, (group, place) in enumerate(zip(own["param_groups"], order, strict=True)):
        theirs = {} if place is None else _without(saved["groups"][place], _NOT_TAKEN)
        for name, mine, yours in _different(theirs, group, chosen):
            places = found.setdefault((name, repr(yours), repr(mine)), [])
            if not places:
                overrides.append(Override(name, yours, mine))
            places.append(number)
        keeps = {key for key in group if key in chosen(group) or key in _NOT_CHOSEN}
        keep = _NOT_TAKEN if resume_settings == "checkpoint" else (*keeps, *_NOT_TAKEN)
        groups.append({**group, **{k: v for k, v in theirs.items() if k not in keep}})
    _load(optimizer, saved, names, groups)
    rates = [None if place is None else saved["groups"][place] for place in order]
    return Restored(
        order,
        tuple(
            Override(o.name, o.saved, o.given, () if len(places) == len(order) else tuple(places))
            for o, places in zip(overrides, found.values(), strict=True)
        ),
        tuple(None if group is None else float(group["lr"]) for group in rates),
        tuple(None if g is None else float(g.get("initial_lr", g["lr"])) for g in rates),
    )


def _load(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    names: Names,
    groups: list[dict[str, Any]],
) -> None:
    flat = list(chain.from_iterable(names.own))
    state: dict[Any, Any] = dict(saved.get("other", {}))
    for number, name in enumerate(flat):
        if name in saved["state"]:
            state[number] = saved["state"][name]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_parameters(saved: Mapping[str, Any], names: Names) -> None:
    theirs = list(chain.from_iterable(group["names"] for group in saved["groups"]))
    own = list(chain.from_iterable(names.groups))
    for missing, first, second in (
        ([name for name in own if name not in set(theirs)], "does not train", "does"),
        ([name for name in theirs if name not in set(own)], "trains", "does not"),
    ):
        if missing:
            raise ValueError(
                f"the checkpoint's optimizer {first} {_listed(missing)}, this run's {second}: give"
                " configure_optimizers the parameters that it was saved with, or start a new run"
                " from the weights"
            )


def _matched(
    saved: Sequence[Mapping[str, Any]], own: Sequence[Sequence[str]], *, must: bool
) -> tuple[int | None, ...]:
    """For each group the one of the checkpoint with the same names."""
    left = list(range(len(saved)))
    order: list[int | None] = []
    for number, names in enumerate(own):
        place = next((i for i in left if set(saved[i]["names"]) == set(names)), None)
        if place is not None:
            left.remove(place)
        elif must:
            raise ValueError(
                f"parameter group {number} of this run's optimizer, of {_listed(names)}, is none of"
                f" the checkpoint's {len(saved)}: make the groups that it was saved with, or let"
                " this run's settings win with resume_settings='arguments'"
            )
        order.append(place)
    return tuple(order)


def _different(
    saved: Mapping[str, Any], group: Mapping[str, Any], chosen: Any
) -> Iterator[tuple[str, Any, Any]]:
    """Settings of a group that are others in the checkpoint: name, this run's, the checkpoint's."""
    for name in chosen(group):
        # A scheduler changes `lr`, and keeps in `initial_lr` what it was.
        key = (
            "initial_lr" if name == "lr" and {"initial_lr"} <= group.keys() & saved.keys() else name
        )
        if key in saved and not same(saved[key], group[key]):
            yield name, group[key], saved[key]


def _chosen(optimizer: Optimizer) -> Any:
    """Which settings of a group the user has chosen, and are not its progress."""
    arguments = set(inspect.signature(type(optimizer).__init__).parameters)

    def chosen(group: Mapping[str, Any]) -> list[str]:
        return [
            name
            for name in group
            if name not in _NOT_CHOSEN and (name in arguments or name not in optimizer.defaults)
        ]

    return chosen


def same(a: Any, b: Any) -> bool:
    """Whether two settings are equal, be they tensors or not."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _without(group: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in names}


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "no parameter"
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
