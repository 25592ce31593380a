"""What this rank computes on, by the name that profiles and plan files know it by."""

from __future__ import annotations

from platform import processor

import torch

from lightning_dhellam.parallel.context import ParallelContext


def device_name(context: ParallelContext) -> str:
    """The device and, of an emulated cluster, its links."""
    if context.device.type != "cuda":
        name = f"{processor() or 'CPU'}, {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name(context.device)
    links = ", ".join(f"{lane}: {emulated.link!r}" for lane, emulated in context.links.items())
    return f"{name}, emulated cluster ({links})" if context.emulated else name
