"""Steps whose loss or gradient is not finite are left out, as if their batch had not been there.

The device decides, so that the host waits for nothing: torch's fused optimizers leave a step out by
themselves (`found_inf`, as under a gradient scaler); of any other the parameters and the state are
kept during its step, and put back. What an optimizer counts on the host, the host puts back when it
hears of the step, which is right before the next one:

    device   step 1  finite?   update or not   step 2  finite?   update or not   step 3
    host     step 1 . . . . .  step 2 . . . .  hears of 1  . . . step 3 . . . .  hears of 2
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dhellam.late import LateValue

_PART = 1 << 27
"""Elements of parameters that are stepped at a time, where steps of several parts are like one."""

_FUSABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Not SGD, whose fused form leaves its momentum undefined if the first step is left out."""

Undo = Callable[[], None]


def prefer_fused(optimizer: Optimizer, device: torch.device) -> None:
    """Let a GPU step by torch's fused form, where the user has left the choice to torch.

    It goes over weights and state once, and leaves out a step by itself.
    """
    if device.type == "cuda" and type(optimizer) in _FUSABLE and _is_left_to_torch(optimizer):
        for settings in (optimizer.defaults, *optimizer.param_groups):
            settings["fused"] = True
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]


def _is_left_to_torch(optimizer: Optimizer) -> bool:
    """Whether no group says in which form it is to be stepped."""
    return not any(
        group["differentiable"] or group["fused"] is not None or group["foreach"] is not None
        for group in optimizer.param_groups
    )


class SkippingOptimizer:
    """Stands for the user's optimizer in Megatron's, and leaves out the steps that are to be.

    Args:
        optimizer: the user's.
        device: of its parameters.

    Attributes:
        finite: whether the next step is done: a boolean on the device, or None to do every step.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._device = device
        self._begun: set[int] = set()
        self._undo: list[Undo] = []
        self.finite: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The user's own."""
        return self._optimizer.param_groups

    @property
    def state(self) -> Any:
        """The user's own."""
        return self._optimizer.state

    def step(self) -> None:
        """Step the user's optimizer, unless `finite` is not."""
        self._undo.clear()
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.finite is None:
            self._optimizer.step()
        elif any(id(p) not in self._begun and p not in self.state for p in stepped):
            # There is no state yet to go back to. This once the host waits.
            if not bool(self.finite):
                return
            self._optimizer.step()
        elif _skips_itself(self._optimizer):
            self._optimizer.found_inf = (~self.finite).float()  # type: ignore[attr-defined]
            try:
                self._optimizer.step()
            finally:
                del self._optimizer.found_inf  # type: ignore[attr-defined]
        else:
            for part in _parts(stepped, _PART) if _is_plain(self._optimizer) else [stepped]:
                with _only(part, stepped):
                    self._step_or_not(part, self.finite)
        self._begun.update(map(id, stepped))

    @property
    def has_counted(self) -> bool:
        """Whether the last step has changed something on the host, which `was_skipped` puts back.

        Torch's fused optimizers count on the device.
        """
        return bool(self._undo)

    def was_skipped(self) -> None:
        """Put back what the last step has changed on the host: it was left out on the device."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _step_or_not(self, parameters: Sequence[Tensor], finite: Tensor) -> None:
        states = [self.state[p] for p in parameters if p in self.state]
        kept = [
            (owner, key, value, value.clone() if isinstance(value, Tensor) else value)
            for holder in (*states, *self.param_groups)
            for owner, key, value in _values(holder)
        ]
        old = [p.clone() for p in parameters]
        self._optimizer.step()
        for parameter, before in zip(parameters, old, strict=True):
            _choose(finite, parameter, before)
        for owner, key, _, before in kept:
            now = owner[key]
            if isinstance(now, Tensor) and now.device == self._device:
                _choose(finite, now, before)
            elif isinstance(now, Tensor):
                if not torch.equal(now, before):
                    self._undo.append(_Copy(now, before))
            elif now != before:
                self._undo.append(_Set(owner, key, before))


class _Copy:
    def __init__(self, tensor: Tensor, before: Tensor) -> None:
        self._tensor, self._before = tensor, before

    def __call__(self) -> None:
        self._tensor.copy_(self._before)


class _Set:
    def __init__(self, owner: Any, key: Any, before: Any) -> None:
        self._owner, self._key, self._before = owner, key, before

    def __call__(self) -> None:
        self._owner[self._key] = self._before


class SkippedSteps:
    """Counts the steps that were left out, a step late, and ends a run of nothing else.

    Args:
        device: of the flags.
        most: steps in a row after which the run ends; the same on all ranks.
        tells: whether this rank warns of each.

    Attributes:
        count: how many were left out.
    """

    def __init__(self, device: torch.device, most: int, *, tells: bool) -> None:
        self._finite = LateValue(device)
        self._scale = LateValue(device)
        self._sent: int | None = None
        self._most = most
        self._tells = tells
        self._in_a_row = 0
        self.count = 0

    def send(self, finite: Tensor, step: int, scale: Tensor | None = None) -> None:
        """Note, on its way to the host, whether `step` was finite, and the next loss's scale."""
        self._finite.put(finite)
        if scale is not None:
            self._scale.put(scale)
        self._sent = step

    def hear(self) -> bool:
        """Whether the step that was sent last was left out; False when that is known already.

        It is the same on all ranks.
        """
        step, self._sent = self._sent, None
        if step is None:
            return False
        skipped, scale = not self._finite.wait(), self._scale.wait()
        # A smaller scale is looked for by leaving out steps: these alone are no reason to end.
        in_search = scale is not None and scale >= 1
        self._in_a_row = self._in_a_row + 1 if skipped and not in_search else 0
        if skipped:
            self.count += 1
            row = f"{self._in_a_row} in a row, " if not in_search else ""
            rest = "" if scale is None else f"; the loss is scaled by {scale:g} from now on"
            if self._tells:
                warnings.warn(
                    f"step {step} was left out: its loss or gradient is not finite"
                    f" ({row}{self.count} in all){rest}",
                    stacklevel=2,
                )
        return skipped

    def check(self) -> None:
        """End a run in which nothing is finite any more.

        Raises:
            FloatingPointError: on all ranks alike.
        """
        if self._in_a_row >= self._most:
            raise FloatingPointError(
                f"the loss or the gradient of {self._in_a_row} steps in a row was not finite, and"
                f" max_skipped_steps={self._most}: the weights are those before these steps; go on"
                " from a checkpoint with a lower learning rate or other data"
            )


def _skips_itself(optimizer: Optimizer) -> bool:
    """Whether it heeds `found_inf`, as torch's gradient scaler would ask it."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether it steps each parameter by itself, and nothing counts its steps."""
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooked = any(getattr(optimizer, name, None) for name in hooks)
    return type(optimizer).__module__.startswith("torch.optim.") and not hooked


def _parts(parameters: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    for parameter in parameters:
        part.append(parameter)
        if sum(p.numel() for p in part) >= size:
            yield part
            part = []
    if part:
        yield part


@contextmanager
def _only(part: Sequence[Tensor], stepped: Sequence[Tensor]) -> Iterator[None]:
    """Hide the gradients of all parameters but those of `part`."""
    own = set(map(id, part))
    hidden = [(p, p.grad) for p in stepped if id(p) not in own]
    try:
        for parameter, _ in hidden:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in hidden:
            parameter.grad = grad


def _values(holder: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Tensors and numbers in what an optimizer keeps, with what they are found in and by what."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in items:
        if isinstance(value, Tensor | int | float):
            yield holder, key, value
        elif isinstance(value, dict | list) and key != "params":
            yield from _values(value)


@torch.no_grad()
def _choose(finite: Tensor, now: Tensor, before: Tensor) -> None:
    torch.where(finite, now, before, out=now)
