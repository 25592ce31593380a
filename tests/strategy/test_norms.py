"""The norm of the gradient, its log, and what is logged and saved where something is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_dhellam.parallel.replicas import is_split
from tests.ranks import run_ranks
from tests.strategy.runs import Model, join, loader, make_trainer


class Found(NamedTuple):
    """What a run had.

    Attributes:
        seen: the norm of each step, as a hook has it.
        logged: as it was logged.
        squares: in the first step, the sums of squares of this rank's gradients: of parameters that
            tensor-parallel ranks share, and of all others.
    """

    seen: list[float]
    logged: list[float]
    squares: tuple[float, float] | None


class Norms(Callback):
    """Notes what is in `Found`."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.logged: list[float] = []
        self.squares: tuple[float, float] | None = None

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.seen.append(module.grad_norm().item())
        if self.squares is None and hasattr(next(module.model.parameters()), "main_grad"):
            parameters = list(module.model.parameters())
            squares = [
                (is_split(p), float(p.main_grad.double().square().sum())) for p in parameters
            ]
            own, common = (
                sum(s for split, s in squares if split is kind) for kind in (True, False)
            )
            self.squares = own, common

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append(trainer.callback_metrics["grad_norm"].item())


def _norms(rank: int, world: int, runs: list[tuple[Any, str]]) -> list[Found]:
    join(rank, world)
    found = []
    for strategy, precision in runs:
        norms = Norms()
        trainer = make_trainer(
            strategy, [norms], max_steps=3, precision=precision, gradient_clip_val=0.5
        )
        trainer.fit(Model(), loader(strategy))
        found.append(Found(norms.seen, norms.logged, norms.squares))
    return found


WHOLE = {"distributed_optimizer": False}
TP, PP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
ALONE: list[tuple[Any, str]] = [("auto", "32-true"), *[({}, each) for each in PRECISIONS]]
PAIR: list[tuple[Any, str]] = [
    *[(sizes, "32-true") for sizes in ({}, WHOLE, TP, PP)],
    *[(sizes, "bf16-mixed") for sizes in ({}, WHOLE, PP)],
    (TP, "bf16-mixed"),
]


def test_the_norm_is_that_of_one_process() -> None:
    (alone,) = run_ranks(1, _norms, 1, ALONE)
    for norms in alone:
        assert norms.seen == norms.logged
        assert min(norms.seen) > 0.5, "nothing would be clipped"
        if norms.squares is not None:  # bf16-true as well: of what is rounded, not rounded itself
            torch.testing.assert_close(norms.seen[0], sum(norms.squares) ** 0.5, rtol=1e-5, atol=0)
    pair = run_ranks(2, _norms, 2, PAIR)
    expected = {precision: norms.seen for (_, precision), norms in zip(ALONE, alone, strict=True)}
    torch.testing.assert_close(alone[0].seen, alone[1].seen, rtol=1e-5, atol=0)
    for (sizes, precision), *ranks in zip(PAIR, *pair, strict=True):
        for norms in ranks:
            assert norms.seen == ranks[0].seen and norms.logged == norms.seen
        if sizes == TP and precision == "bf16-mixed":
            continue  # activations are rounded to bf16 elsewhere
        torch.testing.assert_close(ranks[0].seen, expected[precision], rtol=1e-5, atol=0)
    # There too it is the norm of what the ranks have.
    squares = [
        norms.squares for _, norms in zip(range(2), (rank[-1] for rank in pair), strict=True)
    ]
    assert all(squares)
    total = squares[0][0] + squares[1][0] + squares[0][1]  # type: ignore[index]
    torch.testing.assert_close(pair[0][-1].seen[0], total**0.5, rtol=1e-5, atol=0)


class Spoilt(Model):
    """Its loss is infinite in some steps, on the rank that comes last."""

    steps: tuple[int, ...] = (1, 2)

    def compute_loss(self, logits: Tensor, batch: Any) -> Tensor:
        loss = super().compute_loss(logits, batch)
        last = self.global_rank == self.trainer.world_size - 1
        spoilt = self.trainer.training and last and self.trainer.global_step in self.steps
        return loss * torch.inf if spoilt else loss


class Skips(Callback):
    """How many skipped steps were logged at the end of each step."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append(float(trainer.callback_metrics.get("skipped_steps", 0)))


def _spoilt(rank: int, world: int, folder: str) -> tuple[list[float], bool, str, bool, int]:
    join(rank, world)
    skips = Skips()
    trainer = make_trainer({}, [skips], max_steps=5, gradient_clip_val=1.0)
    module = Spoilt()
    trainer.fit(module, loader({}))
    finite = all(bool(weight.isfinite().all()) for weight in module.parameters())
    path = Path(folder) / "last.ckpt"
    trainer.save_checkpoint(path)
    before = (path / "topology.json").stat().st_mtime_ns
    with torch.no_grad():
        if rank == world - 1:
            module.model.final_norm.weight[0] = torch.nan
    with pytest.raises(ValueError) as refused:
        trainer.save_checkpoint(path)
    kept = (path / "topology.json").stat().st_mtime_ns == before
    with pytest.raises(FloatingPointError, match="max_skipped_steps=2"):
        endless = Spoilt()
        endless.steps = tuple(range(1, 100))
        make_trainer({"max_skipped_steps": 2}, max_steps=9).fit(endless, loader({}))
    return skips.logged, finite, str(refused.value), kept, len(list(Path(folder).iterdir()))


def test_what_is_not_finite_is_left_out_and_not_saved(tmp_path: Path) -> None:
    for logged, finite, refused, kept, files in run_ranks(2, _spoilt, 2, str(tmp_path)):
        # The host hears of a step before the update of the next, after the metrics of that.
        assert logged == [0, 0, 0, 1, 2]
        assert finite and kept and files == 1
        assert "last.ckpt is not written: 'model.final_norm.weight' is not finite" in refused
