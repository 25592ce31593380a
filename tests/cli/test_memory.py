"""`dhellam plan memory`: a table, a picture and values, of a run that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_dhellam.commands.main import main

RECIPE = ["plan", "memory", "--config", "llama-tiny-pp2-2cpu"]


def test_the_memory_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, values = tmp_path / "memory.png", tmp_path / "memory.json"
    files = ["--output", str(picture), "--json", str(values), "--device_memory", "2GiB"]
    assert main([*RECIPE, *files, "--trainer.strategy.recompute", "full"]) == 0
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()][1:4]
    assert head[:3] == ["stage", "ranks", "weights"] and head[-2:] == ["total", "limit"]
    assert [row[:2] for row in rows] == [["0", "1"], ["1", "1"]]
    assert all(row[-1] == "fits" for row in rows)
    read = json.loads(values.read_text())
    assert read["limit"] == 2 << 30 and len(read["stages"]) == 2
    for stage in read["stages"]:
        parts = ("weights", "gradients", "optimizer", "activations", "batch")
        assert stage["tensors"] == sum(stage[part] for part in parts)
        # In fp32: a gradient as large as each weight, and two moments.
        assert stage["optimizer"] > 1.9 * stage["gradients"] > 1.8 * stage["weights"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan", "memory"], "plan memory needs --config FILE, or the name of a recipe"),
        ([*RECIPE, "--device_memory", "much"], "--device_memory='much' must be an amount of"),
        ([*RECIPE, "--trainer.devices", "auto"], "does not say how many ranks: give --ranks N"),
        ([*RECIPE, "--ranks", "3"], "pipeline_parallel_size=2 needs a multiple of 2"),
    ],
)
def test_what_cannot_be_planned(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert sentence in capsys.readouterr().err
