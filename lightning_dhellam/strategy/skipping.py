"""A step that `training_step` skips by returning None: by all ranks, or by none.

Lightning refuses None where there are several ranks, since one that trains would wait for another
that skips. Here every rank says to all others, in host memory, whether it trains. Who trains need
not hear what the others say, so nothing waits in a step that is not skipped.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from typing_extensions import override

if TYPE_CHECKING:
    import lightning.pytorch as pl

SKIPPED = object()
"""What the strategy gives Lightning instead of None."""
_RESULT = "output_result_cls"


class Skipping:
    """What the ranks say to each other about a step.

    Args:
        trainer: that trains.
        group: of all ranks, for tensors in host memory.
    """

    def __init__(self, trainer: pl.Trainer, group: dist.ProcessGroup) -> None:
        self._loop = trainer.fit_loop.epoch_loop.automatic_optimization
        self._group = group
        self._said: tuple[array[float], dist.Work] | None = None
        setattr(self._loop, _RESULT, _Result)

    def trains(self) -> None:
        """Say that this rank trains in this step."""
        self._say(0)

    def skips(self) -> object:
        """Say that this rank does not. What `training_step` is to return instead of None.

        Raises:
            ValueError: another rank trains.
        """
        ranks = self._group.size()
        skipping, work = self._say(1)
        work.wait()
        if skipping[0] < ranks:
            raise ValueError(
                f"training_step returned None on {skipping[0]:.0f} of {ranks} ranks, and a step is"
                " skipped by all of them or by none: to leave out the batch of one, set its labels"
                " to -100, so that nothing of it counts, and train on it"
            )
        return SKIPPED

    def close(self) -> None:
        """Let Lightning's own result be used again by the next run."""
        self._loop.__dict__.pop(_RESULT, None)

    def _say(self, skips: int) -> tuple[array[float], dist.Work]:
        flag = array("f", [skips])
        shared = torch.frombuffer(flag, dtype=torch.float32)
        work = dist.all_reduce(shared, group=self._group, async_op=True)
        assert work is not None
        self._said = flag, work  # the memory that the others' answers come to
        return self._said


class _Result(ClosureResult):
    """Takes `SKIPPED` for the None that Lightning would have refused."""

    @classmethod
    @override
    def from_training_step_output(
        cls, training_step_output: Any, normalize: int = 1
    ) -> ClosureResult:
        output = None if training_step_output is SKIPPED else training_step_output
        return super().from_training_step_output(output, normalize)
