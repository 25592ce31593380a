"""Processes that something else has started and placed, such as Ray Train: it says who they are.

Lightning's own environment learns from the Trainer how many processes there are. One derived from
it may know, whatever `devices` and `num_nodes` say, and nodes may have unequal numbers of them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import Strategy


def is_placed(environment: Any) -> bool:
    """Whether an environment, derived from Lightning's own, knows how many processes there are."""
    return (
        isinstance(environment, LightningEnvironment)
        and type(environment).world_size is not LightningEnvironment.world_size
        and environment.creates_processes_externally
    )


def accept(strategy: type[Strategy], environment: Any) -> None:
    """Let Ray Train take a strategy, if the environment is its own.

    `ray.train.lightning.prepare_trainer` changes nothing, but refuses strategies that are not
    derived from one of Ray's. Those only take device and samples from Ray, as this one does.
    """
    if _is_of_ray(environment):
        from ray.train.lightning import RayDDPStrategy

        RayDDPStrategy.register(strategy)


def device_of(environment: Any, devices: list[torch.device]) -> torch.device:
    """The device of this process, of those that the Trainer has found on its node."""
    if devices[0].type == "cpu":
        return devices[0]
    if _is_of_ray(environment):
        from ray.train.torch import get_device

        found = get_device()
        assert isinstance(found, torch.device)
        return found
    return devices[environment.local_rank()]


def _is_of_ray(environment: Any) -> bool:
    return "ray" in sys.modules and type(environment).__module__.partition(".")[0] == "ray"
