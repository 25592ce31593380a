"""What a strategy that trains through a `Runner` offers to the module, and to callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.runner import Runner


class Place(NamedTuple):
    """Where and in what type a rank's part of a model is built, and from which seed."""

    context: ParallelContext
    dtype: torch.dtype
    seed: int


class Ending(Protocol):
    """How a process learns that it is to end."""

    def is_told_to_end(self) -> bool:
        """Whether this process was told to end."""

    def ending_at_once(self) -> AbstractContextManager[None]:
        """Inside, where no other rank is needed, the exception that ends it is raised at once."""


@runtime_checkable
class RunnerStrategy(Ending, Protocol):
    """A strategy that trains a module through a `Runner`.

    It has methods only, so that a check whether a strategy is one asks it for no value.
    """

    def has_place(self) -> bool:
        """Whether the processes have started, so that the model can be built."""

    def place(self) -> Place:
        """Where the model is built, once the processes have started."""

    def current_runner(self) -> Runner:
        """The runner, once the model is there."""

    def run_batch(self, batch: Mapping[str, Any], *, backward: bool) -> Tensor:
        """The loss of this rank's batch, a scalar in fp32; with `backward`, its gradients too."""

    def run_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [B, S, V] of this rank's batch, without gradients."""
