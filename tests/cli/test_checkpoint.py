"""`dhellam checkpoint show` says what a checkpoint is, and refuses one that is not whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_dhellam.checkpoint.summary import _samples
from lightning_dhellam.commands.main import main
from lightning_dhellam.models import parameter_count
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of
from tests.models.llama import SMALL


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A checkpoint of a loop of one's own, after two steps."""
    with Runner.create(SMALL, CPU, micro_batch_size=2) as runner:
        optimizer = runner.optimizer(torch.optim.AdamW(runner.model.parameters(), lr=0.1))
        for _ in range(2):
            runner.train(batch_of(SMALL, 2, 8))
            optimizer.step()
        runner.save(tmp_path / "kept.ckpt")
    return tmp_path / "kept.ckpt"


def test_a_checkpoint_is_described(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(kept), str(kept)]) == 0
    first, _, second = capsys.readouterr().out.partition("\n\n")
    assert first == second.rstrip("\n")
    whole, steps, weights, optimizer, sizes, made_by = first.splitlines()
    files = [file for file in kept.iterdir() if file.name != "topology.json"]
    assert whole.startswith(f"{kept}: whole, {len(files)} files, ")
    assert steps == "  step 2, epoch 0"
    assert weights.startswith(f"  weights: {parameter_count(SMALL):,} numbers in ")
    # Two moments of each.
    assert optimizer.startswith(f"  optimizer: {8 * parameter_count(SMALL) / 1000:.1f} kB of state")
    assert "precision=32-true" in optimizer
    assert sizes == "  written by one process" and made_by.startswith("  made by Lightning 2.")


def _cut(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _flip], ids=["missing", "cut", "changed"])
@pytest.mark.parametrize("number", range(5))
def test_a_file_that_is_not_as_it_was_written_is_named(
    number: int, damage: Callable[[Path], None], kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sorted(kept.iterdir())[number]
    damage(file)
    assert main(["checkpoint", "show", str(kept)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert file.name in said.err
    assert any(sign in said.err for sign in ("damaged", "has no", "is not a whole"))


def test_samples_are_those_that_a_loader_has_counted() -> None:
    loader = {"fit_loop": {"state_dict": {"combined_loader": [{"other": 1}, {"samples": 12}]}}}
    assert _samples(loader) == 12
    assert _samples({"fit_loop": {"state_dict": {"combined_loader": []}}}) is None
