"""A checkpoint of ours goes on under Lightning's `fsdp`, which begins on GPUs alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dhellam.commands.main import main
from tests.ranks import run_ranks
from tests.strategy.runs import Losses, Model, join, loader, make_trainer

pytestmark = pytest.mark.gpu

STOP, STEPS = 2, 5


def _on_rank(rank: int, root: Path) -> tuple[list[float], list[float]]:
    """Losses of the steps after a checkpoint of ours: under `fsdp`, and under ours."""
    join(rank, 1)
    trainer = make_trainer({}, max_steps=STOP, accelerator="gpu")
    trainer.fit(Model(), loader({}))
    trainer.save_checkpoint(root / "ours.ckpt")
    assert main(["convert", f"{root}/ours.ckpt", f"{root}/whole.ckpt", "--to=lightning"]) == 0
    found = []
    for strategy, path in (("fsdp", root / "whole.ckpt"), ({}, root / "ours.ckpt")):
        losses = Losses()
        trainer = make_trainer(strategy, [losses], max_steps=STEPS, accelerator="gpu")
        trainer.fit(Model(), loader({}), ckpt_path=path)
        found.append(losses.values)
    return found[0], found[1]


def test_a_whole_file_goes_on_under_fsdp(tmp_path: Path) -> None:
    ((theirs, ours),) = run_ranks(1, _on_rank, tmp_path, backend="nccl")
    assert len(theirs) == STEPS - STOP and theirs == pytest.approx(ours, rel=1e-4)
