"""No checkpoint of weights that are not finite takes the place of a good one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from lightning_dhellam.parallel.collectives import together
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.remote import Folder


def check_finite(path: Folder, model: Module, context: ParallelContext) -> None:
    """Refuse to save weights of which one is not finite. Every rank must call this.

    Buffers may be anything: masks have infinities.

    Raises:
        ValueError: on every rank, when one of them has such a weight.
    """
    names, weights = zip(*model.named_parameters(), strict=True)

    def check() -> None:
        # After a run only what was trained may be on the host.
        flags = [_is_finite(weight).to(weights[0].device) for weight in weights]
        finite = torch.stack(flags).tolist()
        if not all(finite):
            name = ExpertNames(model).of_all(names[finite.index(False)])
            raise ValueError(
                f"checkpoint {path} is not written: '{name}' is not finite,"
                " so nothing could go on from it; go on from the checkpoint before"
            )

    together(check, context.world_group)


def _is_finite(weight: Tensor) -> Tensor:
    """Whether all values are, by the least and the greatest: NaN is both if there is any."""
    if not weight.numel():
        return torch.tensor(True, device=weight.device)
    low, high = torch.aminmax(weight.detach())
    return low.isfinite() & high.isfinite()
