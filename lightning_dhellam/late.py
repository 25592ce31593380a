"""Values of the device that the host shows without waiting for them.

Lightning reads whatever is logged with `prog_bar=True` on the host after every step, also where
there is no progress bar, and a device that is read has nothing left to do meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import lightning.pytorch as pl


class LateValue:
    """The last scalar that has come from a device: of this step on a CPU, of an earlier one else.

    Args:
        device: that the scalars are on.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._copy = torch.zeros((), pin_memory=on_cuda)
        self._memory: Any = None  # of the copy: a planned run's has none
        self._arrived = torch.cuda.Event() if on_cuda else None
        self._under_way = False
        self._value: float | None = None

    def put(self, scalar: Tensor) -> None:
        """Send a scalar to the host, unless an earlier one is still under way."""
        self.get()
        if self._memory is None:
            self._memory = self._copy.numpy()
        if not self._under_way:
            self._copy.copy_(scalar.detach(), non_blocking=True)
            self._under_way = True
            if self._arrived is not None:
                self._arrived.record()

    def wait(self) -> float | None:
        """The last one that was sent, waited for if need be; None before the first.

        A step after it was sent the device has long had it, and has newer work to go on with.
        """
        if self._under_way and self._arrived is not None:
            self._arrived.synchronize()
        return self.get()

    def get(self) -> float | None:
        """The last one that has arrived; None before the first."""
        if self._under_way and (self._arrived is None or self._arrived.query()):
            self._value = float(self._memory)
            self._under_way = False
        return self._value


def show(trainer: pl.Trainer, name: str, value: float | None) -> None:
    """Show a number of the host in the progress bar, if there is one yet."""
    if value is not None:
        trainer.progress_bar_metrics[name] = value
