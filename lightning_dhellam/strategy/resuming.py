"""Going on with other settings than the checkpoint's: who wins, and what is said."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dhellam.parallel.optimizer_state import Override, Restored, same

_PARTS = "_schedulers"
"""Where a scheduler that is made of others keeps their states."""
_BY_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)
_NOT_BY_GROUP = ("milestones", "_milestones", "_schedule_phases")
_CHOSEN = (
    "base_lrs",
    "min_lrs",
    "max_lrs",
    "lr_lambdas",
    "_milestones",
    "_schedule_phases",
    "total_size",
    "step_ratio",
)
"""What a scheduler makes of the arguments that it was given."""


def carry_over(
    optimizer: Optimizer,
    schedulers: Sequence[Any],
    saved: Sequence[Mapping[str, Any]],
    restored: Restored,
    resume_settings: str,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The states that schedulers are to load, and a line for each thing that is another one.

    Args:
        optimizer: whose settings are restored already; gets learning rates that fit its schedule.
        schedulers: of this run, new.
        saved: what the checkpoint has of them.
        restored: what `optimizer` has taken of the checkpoint.
        resume_settings: whose settings win, `checkpoint` or `arguments`.

    Raises:
        ValueError: parameter groups have moved, and a scheduler keeps by group what is unknown.
    """
    overrides = [*restored.overrides]
    states = []
    for scheduler, theirs in zip(schedulers, saved, strict=False):
        own = scheduler.state_dict()
        state = _in_order(theirs, own, restored.order, type(scheduler).__name__)
        overrides += _overrides(scheduler, state, own)
        states.append(_merged(scheduler, state, own) if _given_wins(resume_settings) else state)
    lines = [override.said(resume_settings) for override in overrides]
    jump = _settle_rates(optimizer, schedulers, states, restored, resume_settings)
    return states, [*lines, *([jump] if jump else [])]


def of_other_ranks(loops: Mapping[str, Any], saved: int | None, own: int) -> str | None:
    """What is to be said of a loader whose place does not fit this run; None if it does.

    One that counts samples of all ranks together fits any number of them.

    Args:
        loops: what the checkpoint has of them.
        saved: data-parallel ranks that saved it, if that is known.
        own: data-parallel ranks of this run.
    """
    states = loops.get("fit_loop", {}).get("state_dict", {}).get("combined_loader", [])
    odd = [state for state in states if state and "samples" not in state]
    if not odd or saved in (None, own):
        return None
    return (
        f"the DataLoader goes on where its own state says, which a run with {saved} data-parallel"
        f" ranks has saved, and this run has {own}: unless it counts the samples of all ranks, some"
        " are skipped or come again"
    )


def _given_wins(resume_settings: str) -> bool:
    return resume_settings == "arguments"


def _in_order(
    saved: Mapping[str, Any], own: Mapping[str, Any], order: Sequence[int | None], kind: str
) -> dict[str, Any]:
    """The state of a scheduler with what it keeps by group in the order of this run's groups."""
    state = dict(saved)
    if list(order) == list(range(len(order))):
        return state
    for name, value in saved.items():
        if name == _PARTS:
            parts = zip(value, own[name], strict=True)
            state[name] = [_in_order(theirs, mine, order, kind) for theirs, mine in parts]
        elif name in _BY_GROUP:
            mine = own[name]
            state[name] = [mine[i] if j is None else value[j] for i, j in enumerate(order)]
        elif isinstance(value, list) and len(value) == len(order) and name not in _NOT_BY_GROUP:
            raise ValueError(
                f"parameter groups have another order than in the checkpoint, and {kind} keeps"
                f" {name}={value}, maybe by group: make the groups in the order of the checkpoint"
            )
    return state


def _chosen(scheduler: Any) -> set[str]:
    arguments = set(inspect.signature(type(scheduler).__init__).parameters)
    return (arguments | {*_CHOSEN}) - {"last_epoch"}


def _overrides(
    scheduler: Any, saved: Mapping[str, Any], own: Mapping[str, Any]
) -> Iterator[Override]:
    name = type(scheduler).__name__
    for key in own.keys() & saved.keys():
        if key == _PARTS:
            for part, theirs, mine in zip(
                getattr(scheduler, key), saved[key], own[key], strict=False
            ):
                yield from _overrides(part, theirs, mine)
        # `base_lrs` are the groups' own rates, which are compared there.
        elif key in _chosen(scheduler) and key != "base_lrs" and not same(saved[key], own[key]):
            yield Override(f"{name}.{key}", saved[key], own[key])


def _merged(scheduler: Any, saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """How far the checkpoint had come, on the schedule of this run."""
    merged = {**saved, **{key: own[key] for key in _chosen(scheduler) & own.keys()}}
    if _PARTS in own:
        parts = zip(getattr(scheduler, _PARTS), saved.get(_PARTS, ()), own[_PARTS], strict=False)
        merged[_PARTS] = [_merged(part, theirs, mine) for part, theirs, mine in parts]
    return merged


def _settle_rates(
    optimizer: Optimizer,
    schedulers: Sequence[Any],
    states: Sequence[dict[str, Any]],
    restored: Restored,
    resume_settings: str,
) -> str | None:
    """Give the groups this run's rates if they are to win; a line if the rate jumps."""
    planned = None
    if len(schedulers) == len(states) == 1:
        (scheduler,), (state,) = schedulers, states
        # What the checkpoint does not hold of a LambdaLR is its function, which is this run's.
        if _given_wins(resume_settings) or isinstance(scheduler, LambdaLR):
            scheduler.load_state_dict(deepcopy(state))
            planned = _planned(scheduler)
    if planned is None and _given_wins(resume_settings) and states:
        planned = [
            _rate(group) if saved is None or not first else saved * _initial(group) / first
            for group, saved, first in zip(
                optimizer.param_groups, restored.rates, restored.initial_rates, strict=True
            )
        ]
    if planned is None:
        planned = [_rate(group) for group in optimizer.param_groups]
    if _given_wins(resume_settings):
        for group, rate in zip(optimizer.param_groups, planned, strict=True):
            _set_rate(group, rate)
        for state in states:
            state["_last_lr"] = list(planned)
    for number, (before, now) in enumerate(zip(restored.rates, planned, strict=True)):
        if before is not None and abs(now - before) > 1e-6 * max(abs(now), abs(before)):
            when = "now" if _given_wins(resume_settings) else "after the next step"
            return (
                f"the learning rate of parameter group {number} jumps {when}: the checkpoint ended"
                f" at {before:g}, and at this step the schedule of this run has {now:g}"
            )
    return None


def _planned(scheduler: Any) -> list[float] | None:
    """The learning rates that a schedule has at its step, if that is known without the steps."""
    if isinstance(scheduler, LambdaLR):
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        return [float(base * factor(scheduler.last_epoch)) for base, factor in pairs]
    closed = getattr(scheduler, "_get_closed_form_lr", None)
    return None if closed is None else [float(rate) for rate in closed()]


def _rate(group: Mapping[str, Any]) -> float:
    return float(group["lr"])


def _initial(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
