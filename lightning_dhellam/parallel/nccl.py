"""What NCCL and the driver are told before the first collective."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.values import load_yaml

CONFIGURATION = Path(__file__).with_name("nccl.yaml")
"""Settings of communicators, as Megatron-core's `nccl_communicator_config_path`."""

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
_MOST = 32
_FEWEST = 8
_BY_DEFAULT = {
    Collective.ALL_GATHER: 24,
    Collective.REDUCE_SCATTER: 24,
    Collective.ALL_REDUCE: 24,
    Collective.ALL_TO_ALL: 32,
    Collective.EXCHANGE: 16,
    Collective.SEND: 16,
    Collective.RECEIVE: 16,
}
"""Multiprocessors that NCCL takes of itself, between two H200 with 128 MiB (2026-11-29)."""


@cache
def _settings() -> dict[str, dict[str, int]]:
    settings: dict[str, dict[str, int]] = load_yaml(CONFIGURATION)
    return settings


def processors(lane: Lane, collective: Collective) -> int:
    """Multiprocessors that a collective of `lane` takes at most: one for each of its blocks.

    It is what `nccl.yaml` allows, or else what NCCL takes of itself for such a collective.
    """
    allowed = _settings().get(lane, {}).get("max_ctas")
    taken = _BY_DEFAULT[collective]
    return taken if allowed is None else min(taken, allowed)


def high_priority() -> dist.ProcessGroupNCCL.Options | None:
    """Options of a new group whose kernels go before those of compute; None without NCCL."""
    if dist.get_backend() != "nccl":
        return None
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def open_queues() -> str:
    """Let each lane have a queue of the device: call it before CUDA starts in this process.

    Streams that share a queue wait for each other. By default there are 8 queues, and one where the
    environment was made for Megatron-core, which relies on the order of a single queue.

    Returns what is wrong with the environment, or nothing.
    """
    given = os.environ.get(QUEUES)
    if given is None and not torch.cuda.is_initialized():
        os.environ[QUEUES] = str(_MOST)
    if given is not None and (not given.isdigit() or int(given) < _FEWEST):
        return (
            f"{QUEUES}={given} lets lanes share a queue of the GPU, where they wait for each other:"
            f" unset it, or set it to {_MOST}"
        )
    return ""
