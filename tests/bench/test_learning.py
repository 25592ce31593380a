"""The benchmark of learning: the same text in several precisions, in as many calls as it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dhellam.bench.learning import run, side, text
from lightning_dhellam.bench.learning.report import apart, row_of
from lightning_dhellam.bench.learning.settings import Settings
from lightning_dhellam.bench.learning.side import Curve
from lightning_dhellam.commands.main import main
from lightning_dhellam.data.prepare import prepare

TINY = (
    "--device=cpu", "--steps=12", "--layers=1", "--hidden_size=128", "--ffn_hidden_size=128",
    "--vocab_size=270", "--sequence_length=32", "--batch_size=4", "--micro_batch_size=2",
    "--warmup_steps=2", "--evaluate_every=4", "--packages=[]", "--learning_rate=3e-3",
)  # fmt: skip


@pytest.fixture
def prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few pages in place of the standard library's, which takes a minute to prepare."""
    folder = tmp_path / "prose"
    folder.mkdir()
    words = Path(json.__file__).read_text().split()
    for number in range(200):
        part = " ".join(words[number : number + 60])
        (folder / f"{number:03}.txt").write_text(part)
    monkeypatch.setattr(text, "sources", lambda packages: [str(folder)])
    monkeypatch.setattr(side, "_LOOK", 3)
    return folder


class _Stopped:
    """A budget that is spent after some looks at it."""

    def __init__(self, looks: int) -> None:
        self._looks = iter(range(looks, -1, -1))

    @property
    def left(self) -> float:
        return float(next(self._looks, 0))


def _report(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("learning-*.json")
    assert file.with_suffix(".png").stat().st_size > 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _budgets(looks: int) -> Iterator[Any]:
    yield _Stopped(looks)
    while True:
        yield _Stopped(10**6)


def test_every_precision_learns_and_a_second_call_goes_on(
    tmp_path: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = _budgets(4)
    monkeypatch.setattr(run, "Budget", lambda seconds: next(budgets))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    precisions = "--precisions=[bf16, current, blockwise, fp16]"
    words = ["bench", "learning", *TINY, "--save_every=0"]
    assert main([*words, f"--output={parts}", "--precisions=[bf16]"]) == 1
    (row,) = _report(parts)["rows"]
    assert 0 < row["steps"] < 12 and "run the command again" in row["failed"]
    assert main([*words, f"--output={parts}", "--precisions=[bf16]"]) == 0
    assert main([*words, f"--output={whole}", precisions]) == 0
    report = _report(whole)
    assert "standard library (PSF-2.0)" in report["text"] and report["parameters"] > 100_000
    rows = {one["precision"]: one for one in report["rows"]}
    assert list(rows) == ["bf16", "current", "blockwise", "fp16"]
    for one in rows.values():
        (first, early), *_, (last, late) = one["validation"]
        assert (first, last) == (4, 12) and late < early
    assert "over bf16" not in rows["bf16"]
    losses = {name: one["validation loss"] for name, one in rows.items()}
    assert len({*losses.values()}) == 4, "each computes otherwise"
    for name, loss in losses.items():
        assert abs(loss / losses["bf16"] - 1) < 0.02, name
    # Stopped and gone on with, it learns the same to the bit.
    (again,) = _report(parts)["rows"]
    assert again["validation"] == rows["bf16"]["validation"]
    assert again["loss"] == rows["bf16"]["loss"]


def _curve(*validation: float) -> Curve:
    lesson = {"steps": 4 * len(validation), "batch_size": 2, "sequence_length": 8}
    steps = lesson["steps"]
    pairs = [(4 * (number + 1), loss) for number, loss in enumerate(validation)]
    return Curve(lesson, [1.0] * steps, pairs, seconds=2.0)


def test_distances_are_those_of_the_same_steps() -> None:
    plain, other = _curve(4.0, 2.0, 1.0), _curve(4.4, 2.02, 0.996)
    assert apart(other, plain) == pytest.approx({4: 0.1, 8: 0.01, 12: -0.004})
    row = row_of("current", other, plain)
    assert (row["over bf16"], row["farthest"]) == ("-0.400%", "1.000%")
    assert row["tokens/s"] == pytest.approx(12 * 16 / 2) and "failed" not in row


def test_curves_of_another_lesson_are_not_gone_on_with(tmp_path: Path) -> None:
    curve = _curve(1.0)
    curve.save(tmp_path / "bf16.json")
    assert Curve.load(tmp_path / "bf16.json", curve.lesson).losses == curve.losses
    assert Curve.load(tmp_path / "bf16.json", {**curve.lesson, "steps": 8}).losses == []
    assert Settings().lesson != Settings(seed=1).lesson


def test_a_state_of_another_lesson_is_not_gone_on_with(tmp_path: Path, prose: Path) -> None:
    from lightning_dhellam.bench.learning import BENCHMARK

    first, _ = BENCHMARK.parse("dhellam bench learning", ["--precisions=[bf16]", *TINY])
    second = replace(first, seed=7)
    data = prepare([str(prose)], tmp_path / "data", vocab_size=270)

    def stopped(settings: Settings) -> Curve:
        return side.learn(settings, "bf16", data.path, tmp_path, torch.device("cpu"), _Stopped(1))

    begun = stopped(first)
    # Ended by something else after its first validation, which leaves a curve and no state.
    Curve(second.lesson, [9.0] * 4, [(4, 9.0)]).save(tmp_path / "bf16.json")
    other = stopped(second)
    assert other.lesson == second.lesson and len(other.losses) == len(begun.losses)
    assert other.losses[0] != begun.losses[0]
    longer = stopped(second)
    assert len(longer.losses) > len(other.losses) == len(begun.losses)
    assert longer.losses[: len(other.losses)] == other.losses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precisions=[fp4]"], r"--precisions: 'fp4' is not one: use bf16, current, blockwise"),
        (["--hidden_size=100"], r"--hidden_size=100 must be a multiple of 128"),
        (["--steps=0"], r"--steps=0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured(words: list[str], message: str) -> None:
    from lightning_dhellam.bench.learning import BENCHMARK

    with pytest.raises(ValueError, match=message):
        BENCHMARK.parse("dhellam bench learning", words)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"'no_such' is not installed: pip install no_such"):
        text.sources(("no_such",))
