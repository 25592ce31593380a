"""`dhellam bench pipeline` runs all sides, and they compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_dhellam.bench.command import bench_command


def test_all_sides_agree_and_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--layers=4", "--micro_batches=3", "--sequence=16", "--steps=2"]
    assert bench_command(["pipeline", f"--output={tmp_path}", *options]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("pipeline-*.json")
    rows = json.loads(file.read_text())["rows"]
    auto = rows[3]["side"]
    assert [row["side"] for row in rows] == [
        "fold",
        "zb-v",
        "dualpipe-v",
        auto,
        "Megatron-core 1F1B",
    ]
    assert auto.startswith("auto: ")
    for row in rows:
        assert row["side"] in printed
        assert len(row["seconds"]) == 2 and row["error"] <= 1e-5
        assert 8 < row["loss"] < 9 and row["grad norm"] > 0
        assert row["over megatron-core"] == pytest.approx(rows[-1]["ms"] / row["ms"])


def test_a_schedule_of_other_placements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--schedules: '1f1b' is not .*use zb-v or dualpipe-v"):
        bench_command(["pipeline", "--schedules=['1f1b']"])


def test_layers_that_megatron_cannot_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--layers 5 --stages 2: .*a multiple of --stages"):
        bench_command(["pipeline", "--layers=5"])
