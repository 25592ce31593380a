"""How a process that no Trainer has started joins those of its job."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_dhellam.parallel import groups
from lightning_dhellam.parallel.nccl import open_queues


def this_device(given: torch.device | str | None = None) -> torch.device:
    """The device of this process: as given, or its GPU (`LOCAL_RANK`), or the CPU without any.

    Raises:
        ValueError: a device of another kind.
    """
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(given)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device='{given}' does not work: use 'cuda' or 'cpu'")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def join(device: torch.device, timeout: timedelta) -> Callable[[], None]:
    """Initialise torch.distributed, unless it is: as torchrun says, or for this process alone.

    Call it before CUDA starts in this process. Returns what undoes it.

    Raises:
        ValueError: Megatron's own groups are there already.
    """
    if groups.are_open():
        raise ValueError(
            "Megatron's groups are there already: leave out initialize_model_parallel, since"
            " Runner.create makes them, or end what has made them first"
        )
    if device.type == "cuda":
        obstacle = open_queues()
        if obstacle:
            warnings.warn(obstacle, stacklevel=3)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return _nothing
    backend = "nccl" if device.type == "cuda" else "gloo"
    on_device = device if device.type == "cuda" else None
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=on_device)
    else:
        alone = dist.HashStore()
        dist.init_process_group(
            backend, store=alone, rank=0, world_size=1, timeout=timeout, device_id=on_device
        )
    return dist.destroy_process_group


def _nothing() -> None:
    pass
