"""A step that `training_step` skips by returning None: by all ranks, or by none.

Lightning refuses None where there are several ranks, since one that trains would wait for another
that skips. Here every rank says to all others, in host memory, whether it trains. Who trains need
not hear what the others say, so nothing waits in a step that is not skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.loops.optimization.automatic import ClosureResult
from typing_extensions import override

from lightning_dhellam.parallel.hosts import Question, ReduceOp

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import torch.distributed as dist

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
        self._said: Question | None = None
        setattr(self._loop, _RESULT, _Result)

    def trains(self) -> None:
        """Say that this rank trains in this step."""
        # Kept, since the others' answers come to its memory.
        self._said = Question([0], self._group, ReduceOp.SUM)

    def skips(self) -> object:
        """Say that this rank does not. What `training_step` is to return instead of None.

        Raises:
            ValueError: another rank trains.
        """
        ranks = self._group.size()
        self._said = Question([1], self._group, ReduceOp.SUM)
        (skipping,) = self._said.answer()
        if skipping < ranks:
            raise ValueError(
                f"training_step returned None on {skipping:.0f} of {ranks} ranks, and a step is"
                " skipped by all of them or by none: to leave out the batch of one, set its labels"
                " to -100, so that nothing of it counts, and train on it"
            )
        return SKIPPED

    def close(self) -> None:
        """Let Lightning's own result be used again by the next run."""
        self._loop.__dict__.pop(_RESULT, None)


class _Result(ClosureResult):
    """Takes `SKIPPED` for the None that Lightning would have refused."""

    @classmethod
    @override
    def from_training_step_output(
        cls, training_step_output: Any, normalize: int = 1
    ) -> ClosureResult:
        output = None if training_step_output is SKIPPED else training_step_output
        return super().from_training_step_output(output, normalize)
