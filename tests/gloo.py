"""One thread that listens for all of gloo's groups of a process, instead of one for each.

Gloo gives every group a thread that looks a hundred times a second whether something has come.
Megatron-core opens 28 groups for a run, and those of a test's earlier runs live until Python
collects them: in processes of many runs their threads took longer than the runs. Groups have
connections of their own as before.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

_Gloo = dist.ProcessGroupGloo
_listening: dict[int, Any] = {}
"""What listens, by the process: a fork has no threads of the process that it was forked from."""


class _Listened(type):
    """Stands where torch makes groups of gloo, and asks whether one is of gloo."""

    def __call__(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        if os.getpid() not in _listening:
            _listening[os.getpid()] = _Gloo.create_default_device()
        options = _Gloo._Options()
        options._devices = [_listening[os.getpid()]]
        options._threads = 2
        options._timeout = timeout
        return _Gloo(store, rank, size, options)

    def __instancecheck__(cls, group: object) -> bool:
        return isinstance(group, _Gloo)


class _OneThread(metaclass=_Listened):
    """Makes groups of gloo."""


distributed_c10d.ProcessGroupGloo = _OneThread  # type: ignore[attr-defined, misc]
