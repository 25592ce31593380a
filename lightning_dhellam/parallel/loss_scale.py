"""Loss scaling of fp16: small gradients are kept from vanishing, and large ones from infinity.

The loss is multiplied by a scale, which all gradients then have, until the optimizer is about to
read them. A step whose gradient is infinite is left out, and the next one has a smaller scale;
after many steps in a row that were not, the scale grows. The rule is `torch.amp.GradScaler`'s, and
torch's own kernel carries it out on the device. Megatron-core's scaler asks the host in every step,
which would wait for the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """How the scale of a loss begins, and how it changes.

    Attributes:
        initial: the scale of the first step.
        growth: what it is multiplied by after `interval` steps in a row that were finite.
        backoff: what it is multiplied by after a step that was not.
        interval: steps in a row until it grows.

    Raises:
        ValueError: with these numbers it could not change as it must.
    """

    initial: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        rules = {
            "initial": (self.initial > 0, "positive"),
            "growth": (self.growth >= 1, "at least 1"),
            "backoff": (0 < self.backoff < 1, "between 0 and 1"),
            "interval": (self.interval >= 1, "at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"loss scaling: {name}={getattr(self, name)} must be {rule}")


class LossScale:
    """The scale of the loss, the same on all ranks. Nothing waits for a device.

    Args:
        scaling: how it begins and changes.
        device: of the gradients.

    Attributes:
        value: a scalar in fp32.
    """

    def __init__(self, scaling: Scaling, device: torch.device) -> None:
        self._scaling = scaling
        self.value = torch.tensor(scaling.initial, device=device)
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        """Divide `gradients` by the scale, in place."""
        if gradients:
            torch._foreach_mul_(list(gradients), self.value.reciprocal())

    def update(self, finite: Tensor) -> None:
        """A step is over, and `finite`, a scalar, says whether it was done or left out."""
        rule = self._scaling
        torch._amp_update_scale_(
            self.value,
            self._steps,
            finite.logical_not().float(),
            rule.growth,
            rule.backoff,
            rule.interval,
        )

    def state_dict(self) -> dict[str, Any]:
        """The scale, and the steps since it changed. The host waits for them."""
        return {"scale": float(self.value), "steps": int(self._steps), **asdict(self._scaling)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the scale and the steps that `state_dict` has given; the rule stays."""
        self.value.fill_(state["scale"])
        self._steps.fill_(state["steps"])
