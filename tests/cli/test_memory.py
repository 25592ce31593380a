"""`dhellam plan memory`: a table, a picture and values, of a run that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dhellam.commands.main import main
from lightning_dhellam.commands.optimizer import configured
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from tests.engine.harness import CPU
from tests.strategy.runs import Model

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


def _optimizer_bytes(tmp_path: Path, *words: str) -> list[int]:
    values = tmp_path / "memory.json"
    assert main(["plan", "memory", *words, "--json", str(values)]) == 0
    return [stage["optimizer"] for stage in json.loads(values.read_text())["stages"]]


def test_the_optimizer_is_the_one_that_is_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPE[2:]
    adamw = _optimizer_bytes(tmp_path, *recipe)
    momentum = ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.1"]
    momentum += ["--optimizer.momentum", "0.9"]
    other = _optimizer_bytes(tmp_path, *recipe, *momentum)
    assert [round(a / b, 1) for a, b in zip(adamw, other, strict=True)] == [2.0, 2.0]
    assert "taken to be AdamW" not in capsys.readouterr().err


def test_a_module_makes_its_optimizer_of_the_planned_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Own(Model):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 7
            made = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return [made], [torch.optim.lr_scheduler.ConstantLR(made)]

    class Late(Model):
        def configure_optimizers(self) -> Any:
            raise RuntimeError("not before\nthe data")

    model = CausalLM(Own().model_config, ParallelContext.single(CPU))
    own = Own()
    made = configured({"model": own, "trainer": {"max_steps": 7}})(model)
    assert isinstance(made, torch.optim.SGD)
    assert len(made.param_groups[0]["params"]) == len(list(model.parameters()))
    assert "model" not in own._modules and own._trainer is None
    late = configured({"model": Late(), "trainer": {}})(model)
    assert isinstance(late, torch.optim.AdamW)
    assert capsys.readouterr().err == (
        "the optimizer is taken to be AdamW: RuntimeError: not before the data\n"
    )


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
