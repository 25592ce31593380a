"""Whether the ranks of a job are in an exception together, or one of them is alone in it.

Lightning lets callbacks save a checkpoint when an exception comes up. That takes all ranks. Those
that know of no exception are in the middle of a step, where they wait for the one that has left it.
"""

from __future__ import annotations

import hashlib
import time

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import _get_default_store

_PATIENCE = 5.0
"""Seconds that the first ranks in an exception wait for the last ones."""


def is_shared(error: BaseException, place: str) -> bool:
    """Whether all ranks have raised this error at this place, and so are in step with each other.

    All get the same answer, within seconds, also where some never ask.

    Args:
        error: that this rank has raised.
        place: where, in words that are the same on all ranks and never come again in the job.
    """
    if isinstance(error, SIGTERMException):
        return True  # `Termination` raises it on all ranks or on none
    if isinstance(error, KeyboardInterrupt):
        return False  # finds every rank somewhere else
    text = f"{place} {type(error).__name__}: {error}"
    key = f"dhellam/exception/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        return _decided(key)
    except RuntimeError:  # the process that has kept the store is gone
        return False


def _decided(key: str) -> bool:
    """Yes if every rank comes here in time: by the last one. No by whoever has waited too long."""
    store = _get_default_store()
    decision = f"{key}/decision"
    if store.add(key, 1) == dist.get_world_size():
        return bool(store.compare_set(decision, "", "yes") == b"yes")
    deadline = time.monotonic() + _PATIENCE
    while not store.check([decision]):
        if time.monotonic() > deadline:
            return bool(store.compare_set(decision, "", "no") == b"yes")
        time.sleep(0.05)
    return bool(store.get(decision) == b"yes")
