"""No checkpoint of weights that are not finite takes the place of a good one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.remote import Folder


class Finiteness:
    """Which weights of a model are finite: asked of the device, and not waited for.

    Buffers may be anything: masks have infinities.

    Attributes:
        flags: of each weight, on the device; they may be replaced by a copy.
    """

    def __init__(self, model: Module) -> None:
        self._names, weights = zip(*model.named_parameters(), strict=True)
        self._of_all = ExpertNames(model).of_all
        # After a run only what was trained may be on the host.
        self.flags = torch.stack([_is_finite(w).to(weights[0].device) for w in weights])

    def check(self, path: Folder) -> None:
        """Refuse to save weights of which one is not finite.

        Raises:
            ValueError: this rank has such a weight.
        """
        finite = self.flags.tolist()
        if not all(finite):
            name = self._of_all(self._names[finite.index(False)])
            raise ValueError(
                f"checkpoint {path} is not written: '{name}' is not finite,"
                " so nothing could go on from it; go on from the checkpoint before"
            )


def _is_finite(weight: Tensor) -> Tensor:
    """Whether all values are, by the least and the greatest: NaN is both if there is any."""
    if not weight.numel():
        return torch.tensor(True, device=weight.device)
    low, high = torch.aminmax(weight.detach())
    return low.isfinite() & high.isfinite()
