"""`dhellam bench memory`, rehearsed on the CPU: there what is predicted is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_dhellam.bench.command import bench_command
from lightning_dhellam.bench.memory import run
from lightning_dhellam.bench.memory.cases import cases
from lightning_dhellam.bench.memory.report import Taken, row_of
from lightning_dhellam.memory import RankMemory

CASES = ("selective", "experts", "tp 4", "first of 4 stages", "last of 4 stages")


def bench(folder: Path, *names: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """The rows that the benchmark has written, by case."""
    words = ["--device=cpu", "--steps=3", f"--cases={json.dumps(names)}", f"--output={folder}"]
    assert bench_command(["memory", *words]) == code
    assert not dist.is_initialized()
    (file,) = folder.glob("memory-*.json")
    return {row["case"]: row for row in json.loads(file.read_text())["rows"]}


def test_slots_and_states_are_predicted_to_the_byte(tmp_path: Path) -> None:
    rows = bench(tmp_path, *CASES)
    assert [*rows] == [*CASES]
    for name, row in rows.items():
        assert row["error"] == row["slots error"] == 0.0, name
        assert row["retries"] == row["growth MiB"] == 0 and row["measured GiB"] > 0
        assert len(row["losses"]) == 3
        # Losses of ranks that are played alone mean nothing.
        assert ("loss" in row) is ("parity" in row) is not ("tp" in name or "stages" in name)
    assert rows["selective"]["parity"] == 0.0 and rows["selective"]["loss"] < 5.6
    assert rows["last of 4 stages"]["recompute"] == "full"


def test_auto_has_room_for_a_part_and_is_predicted_as_it_has_chosen(tmp_path: Path) -> None:
    row = bench(tmp_path, "auto")["auto"]
    assert row["recompute"] == "by layer" and row["error"] == 0.0 and row["parity"] == 0.0
    assert {"none"} < {str(choice) for choice in row["made again"].values()}


def test_a_case_that_fails_costs_its_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(row: dict[str, Any], *_: Any) -> None:
        row["loss"] = 1.0
        if row["case"] == "none":
            raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(run, "_fill", fill)
    rows = bench(tmp_path, "none", "full", code=1)
    assert rows["none"]["failed"] == "RuntimeError: out of memory"
    assert "failed" not in rows["full"]


def test_what_is_wrong_shows_in_a_row() -> None:
    predicted = RankMemory(0, 1, weights=1 << 30, gradients=0, optimizer=0, activations=90, batch=0)
    row = row_of(predicted, Taken(peak=1 << 31, slots=100, growth=3 << 20, retries=2))
    assert row["slots error"] == pytest.approx(-0.1)
    assert row["error"] == pytest.approx(-0.5)
    assert row["growth MiB"] == 3 and row["retries"] == 2


def test_ten_runs_are_measured_whatever_their_size() -> None:
    assert len(cases(rehearses=True)) == len(cases(rehearses=False)) == 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cases=['nothing']", "--cases: 'nothing' is not a case: use none, selective"),
        ("--steps=2", "--steps 2 must be at least 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bench_command(["memory", "--device=cpu", words])
