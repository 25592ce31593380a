"""A mistake in a recipe or an override is one line: what, where, and the nearest right name."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_dhellam import recipes
from lightning_dhellam.commands.main import main

RECIPE: dict[str, Any] = yaml.safe_load(recipes.find("llama-tiny-2cpu").read_text())
HERE = __name__
DEEP = {"x": 1, "y": 2}


class Settled(LightningModule):
    """Knows what it was given; nothing trains it."""

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        rate: float = 1e-3,
        epsilon: float | None = None,
    ) -> None:
        super().__init__()
        raise Told(settings, rate)


class NoData(LightningDataModule):
    """Holds nothing."""


class Told(Exception):
    """Carries what a module was given out of what would train it."""


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The only line that `dhellam fit` says, and exits with 2."""
    assert main(["fit", *words]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")
    ]
    assert len(lines) == 1, lines
    assert lines[0].startswith("dhellam fit: error: ")
    return lines[0].removeprefix("dhellam fit: error: ")


def _set(*path: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(recipe: dict[str, Any]) -> None:
        for name in path:
            recipe = recipe[name]
        recipe.update(values)

    return change


DATA = ("data", "init_args")
MODEL = ("model", "init_args")
STRATEGY = ("trainer", "strategy", "init_args")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set("trainer", max_stepz=3), "trainer.max_stepz is not known; did you mean 'trainer.max"),
        (_set(trainr={}), "unknown key 'trainr'; did you mean 'trainer'?"),
        (_set("model", init_arg={}), "unknown key 'init_arg' beside model.class_path; did you m"),
        (_set(*DATA, sequence_lenght=3), "data.sequence_lenght is no argument of lightning_dhel"),
        (_set(*DATA, sequence_length=None), "data.sequence_length must be given"),
        (_set(*DATA, seed=None), "data.seed is blank: give it a whole number, or leave it out"),
        (_set(*DATA, num_workers=None), "data.num_workers is blank: give it a whole number"),
        (_set(*DATA, split=3), "data.split=3 must be text"),
        (_set(*MODEL, learning_rate=None), "model.learning_rate is blank: give it a number"),
        (_set(*MODEL, overrides={"rotary_base": None}), "rotary_base is blank: give it a number"),
        (_set(*MODEL, overrides={"num_layers": 1.5}), "num_layers=1.5 must be a whole number"),
        (_set("trainer", max_steps=None), "trainer.max_steps is blank: give it a whole number"),
        (_set("trainer", precision=7), "trainer.precision=7 must be one of 64, 32, 16, 'transf"),
        (_set(*STRATEGY, recompute=None), "trainer.strategy.recompute is blank: give it text or a"),
        (_set(seed_everything=None), "seed_everything is blank: give it a whole number"),
        (
            _set("model", class_path="lightning_dhellam.LanguageModl"),
            "model: class_path 'lightning_dhellam.LanguageModl': module 'lightning_dhellam' has no"
            " attribute 'LanguageModl'; did you mean 'LanguageModel'?",
        ),
        (
            _set("trainer", callbacks=[{"class_path": f"{HERE}.Told"}]),
            "trainer.callbacks",
        ),
    ],
)
def test_a_mistake_in_a_recipe(
    change: Callable[[dict[str, Any]], None],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = copy.deepcopy(RECIPE)
    change(recipe)
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    assert sentence in said(capsys, "--config", "mine.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "mine.yaml: is empty, and must be a mapping with seed_everything, trainer, model, d"),
        ("- 1", "mine.yaml: is [1], and must be a mapping"),
        ("trainer:\n  max_steps: 1\n  max_steps: 2\n", "line 3 gives 'max_steps' a second time"),
        ("trainer: [\n", "mine.yaml: not YAML: while parsing a flow node"),
        ("trainer:\n  max_steps: 1\n", "no data and no model: give --config with a file or the n"),
    ],
)
def test_a_file_that_is_no_recipe(
    text: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    assert sentence in said(capsys, "--config", "mine.yaml")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--trainer.max_stepz", "10"],
            "--trainer.max_stepz is not known; did you mean '--trainer.max_steps'?",
        ),
        (["--max_steps", "3"], "--max_steps is not known; did you mean '--trainer.max_steps'?"),
        (
            ["--trainer.strategy.tensor_parallel=2"],
            "trainer.strategy.tensor_parallel is no argument of lightning_dhellam.DHellamStrategy;"
            " did you mean 'tensor_parallel_size'?",
        ),
        (["--model.learning_rat=2"], "; did you mean 'learning_rate'?"),
        (["--data.sequence_length=abc"], "data.sequence_length=abc must be a whole number"),
        (["--trainer.gradient_clip_val=abc"], "trainer.gradient_clip_val=abc must be a whole"),
        (["--data=nothing.Module"], "data: class_path 'nothing.Module': No module named 'nothing"),
        (["--data=Nothing"], "data=Nothing is no class: give it with its module, as package.mod"),
        (["llama-tiny-2cpu"], "'llama-tiny-2cpu' stands behind no option: did you mean --config "),
        ([f"--data={HERE}.NoData", "--trainer.strategy=ddpp"], "trainer: You selected an invalid"),
        ([f"--data={HERE}.NoData", "--trainer.devices=abc"], "trainer: `devices` selected with"),
    ],
)
def test_a_mistake_on_the_command_line(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in said(capsys, "--config", "llama-tiny-2cpu", *words)


def test_a_configuration_that_was_printed_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "llama-tiny-2cpu", "--print_config"])
    Path("mine.yaml").write_text(capsys.readouterr().out)
    assert "holds no dataset" in said(capsys, "--config", "mine.yaml"), "and nothing is blank"


def test_a_module_in_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    Path("here_alone.py").write_text(
        "from lightning.pytorch import LightningDataModule\n"
        "class Mine(LightningDataModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        import lightning_dhellam.models as models\n"
        "        models.preset('found')\n"
    )
    line = said(capsys, "--config", "llama-tiny-2cpu", "--data=here_alone.Mine")
    assert line.startswith("unknown preset 'found'")


def test_gpus_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    line = said(capsys, "--config", "llama-3-8b-8gpu")
    assert "trainer.accelerator=gpu, but torch sees no GPU on this machine" in line
    assert "--config llama-tiny-2cpu" in line
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    line = said(capsys, "--config", "llama-3-8b-8gpu")
    assert "trainer.devices=8, but torch sees 2 GPU(s) on this machine" in line


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["--model.settings.a", "7"], {"a": 7}),
        (["--model.settings.b.c", "7"], {"b": {"c": 7, "d": 2, "deep": DEEP}}),
        (["--model.init_args.settings.b.d=7e9"], {"b": {"c": 1, "d": 7e9, "deep": DEEP}}),
        (
            ["--model.settings.b.deep.x", "9", "--model.settings.b.d=-1"],
            {"b": {"c": 1, "d": -1, "deep": {"x": 9, "y": 2}}},
        ),
        (["--model.settings.new.key", "[1, 2]"], {"new": {"key": [1, 2]}}),
    ],
)
def test_an_override_inside_a_mapping_keeps_its_other_keys(
    words: list[str], changed: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"a": 1, "e": 1e-5, "b": {"c": 1, "d": 2, "deep": DEEP}}
    recipe = {
        "trainer": {"logger": False, "accelerator": "cpu"},
        "model": {
            "class_path": f"{HERE}.Settled",
            "init_args": {"settings": settings, "rate": "370e9", "epsilon": None},
        },
        "data": f"{HERE}.NoData",
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe).replace("'370e9'", "370e9"))
    with pytest.raises(Told) as told:  # what a module raises is not wrapped
        main(["fit", "--config", str(file), *words])
    assert told.value.args == ({**settings, **changed}, 370e9)
