"""From a folder of Hugging Face to training and back, in a Trainer and by `dhellam convert`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_dhellam import DualStrandMixin, LanguageModel
from lightning_dhellam.commands.main import main
from lightning_dhellam.models import config_of, export_huggingface, preset
from lightning_dhellam.models.layout import HEAD
from lightning_dhellam.runner import Runner
from tests.models.folders import SHAPES, save_folder
from tests.models.llama import relative_error
from tests.ranks import run_ranks
from tests.strategy.runs import join, make_trainer

LENGTH = 16


class Tokens(LightningDataModule):
    """The same few tokens again and again."""

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(3, 40, (4, LENGTH + 1), generator=generator)
        samples = [{"tokens": row[:-1], "labels": row[1:]} for row in rows.repeat(20, 1)]
        return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


class Own(DualStrandMixin):
    """A user's module, whose model the folder replaces."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.model_config = preset("llama-tiny")
        self.rate = rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def _fit(module: DualStrandMixin, steps: int, **sizes: Any) -> float:
    trainer = make_trainer({**sizes}, max_steps=steps)
    trainer.fit(module, Tokens())
    return float(trainer.callback_metrics["train_loss"])


def _loss(folder: Path) -> float:
    """Of transformers, of the samples that are trained on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The usual one takes rows of multiples of 16 bytes only.
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    batch = next(iter(Tokens().train_dataloader()))
    with torch.no_grad():
        logits = model(batch["tokens"]).logits.flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, batch["labels"].flatten()))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_is_trained_for_twenty_steps_and_saved(name: str, tmp_path: Path) -> None:
    save_folder(SHAPES[name], tmp_path / "theirs")
    module = Own.from_pretrained(tmp_path / "theirs", rate=3e-3)
    module.save_pretrained(tmp_path / "before")
    before, theirs = _tensors(tmp_path / "before"), _tensors(tmp_path / "theirs")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in before.items())
    loss = _fit(module, 20)
    module.save_pretrained(tmp_path / "after", "bfloat16", max_shard_size="20KB")
    first, last = _loss(tmp_path / "theirs"), _loss(tmp_path / "after")
    assert loss < first and last < first
    assert (tmp_path / "after" / "tokenizer.json").is_file()


def test_a_language_model_takes_its_shape_from_the_folder(tmp_path: Path) -> None:
    save_folder(SHAPES["llama"], tmp_path)
    module = LanguageModel.from_pretrained(
        tmp_path, learning_rate=1e-3, overrides={"hidden_dropout": 0.1, "max_sequence_length": 32}
    )
    assert module.hparams["pretrained"] == str(tmp_path) and module.pretrained == tmp_path
    assert module.model_config.hidden_dropout == 0.1
    assert module.model_config.num_layers == SHAPES["llama"].num_layers
    with pytest.raises(ValueError, match=r"overrides\.num_layers=7 contradicts pretrained="):
        LanguageModel(pretrained=str(tmp_path), overrides={"num_layers": 7})
    with pytest.raises(ValueError, match=r"preset=llama-tiny contradicts pretrained="):
        LanguageModel("llama-tiny", pretrained=str(tmp_path))
    with pytest.raises(ValueError, match=r"pretrained=nowhere is not a folder: give a folder of"):
        LanguageModel(pretrained="nowhere")


def test_the_command_trains_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(SHAPES["llama"], tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--model=lightning_dhellam.LanguageModel", "--data", f"{__name__}.Tokens"]
    words += [f"--model.pretrained={tmp_path / 'theirs'}", "--trainer.max_steps=1"]
    words += ["--trainer.strategy=lightning_dhellam.DHellamStrategy", "--trainer.accelerator=cpu"]
    words += ["--trainer.devices=1", "--trainer.logger=false"]
    words += ["--trainer.enable_checkpointing=false"]
    assert main([*words, "--model.overrides={num_layers: 3}"]) == 2
    assert "overrides.num_layers=3 contradicts pretrained=" in capsys.readouterr().err
    assert main([*words, "--model.preset=llama-tiny"]) == 2
    assert "preset=llama-tiny contradicts pretrained=" in capsys.readouterr().err


def test_the_command_trains_a_folder_goes_on_and_its_checkpoint_becomes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_folder(SHAPES["llama"], tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--model=lightning_dhellam.LanguageModel", "--data", f"{__name__}.Tokens"]
    words += ["--model.pretrained=theirs", "--model.learning_rate=1e-2", "--trainer.devices=1"]
    words += ["--trainer.strategy=dhellam", "--trainer.accelerator=cpu"]
    words += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    for folder, steps in (("first", 2), ("rest", 4)):
        resumed = [f"--ckpt_path={kept}" for kept in Path("first").rglob("*.ckpt")]
        assert len(resumed) == (folder == "rest")
        options = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}"]
        assert main([*words, *options, *resumed]) == 0, capsys.readouterr().err
    (kept,) = Path("rest").rglob("*.ckpt")
    assert main(["convert", str(kept), "back"]) == 0
    assert _loss(Path("back")) < _loss(Path("theirs"))
    assert _tensors(Path("back")).keys() == _tensors(Path("theirs")).keys()
    assert config_of("back") == config_of("theirs")
    assert Path("back/tokenizer.json").read_bytes() == Path("theirs/tokenizer.json").read_bytes()


class Plain(Own):
    """Of which no optimizer makes roundings larger."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def _trained(folder: Path, target: Path, **sizes: Any) -> None:
    module = Plain.from_pretrained(folder, rate=0.1)
    _fit(module, 3, micro_batch_size=1, **sizes)
    module.save_pretrained(target)


def _trained_by_two(rank: int, root: Path) -> None:
    join(rank, 2)
    for name in ("tensor", "pipeline"):
        _trained(root / "theirs", root / name, **{f"{name}_parallel_size": 2})


def test_two_ranks_train_a_folder_as_one_does(tmp_path: Path) -> None:
    save_folder(replace(SHAPES["llama"], num_layers=4), tmp_path / "theirs")
    run_ranks(2, _trained_by_two, tmp_path)
    _trained(tmp_path / "theirs", tmp_path / "alone")
    before, expected = _tensors(tmp_path / "theirs"), _tensors(tmp_path / "alone")
    assert relative_error(before[HEAD], expected[HEAD]) > 1e-3
    for name in ("tensor", "pipeline"):
        found = _tensors(tmp_path / name)
        assert found.keys() == expected.keys()
        errors = {one: relative_error(found[one], expected[one]) for one in expected}
        assert max(errors.values()) <= 1e-5, (name, errors)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_convert_goes_to_a_checkpoint_and_back_bitwise(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, kept, back = (str(tmp_path / part) for part in ("theirs", "kept.ckpt", "back"))
    save_folder(SHAPES[name], Path(theirs))
    assert main(["convert", theirs, f"{theirs}-half", "--to=huggingface", "--dtype=bfloat16"]) == 0
    assert main(["convert", f"{theirs}-half", kept]) == 0
    assert main(["convert", kept, back, "--max_shard_size", "20KB"]) == 0
    assert capsys.readouterr().out.endswith(f"written to {back}\n")
    before, after = _tensors(Path(f"{theirs}-half")), _tensors(Path(back))
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype == torch.bfloat16
        assert torch.equal(before[tensor], after[tensor]), tensor
    assert config_of(back) == config_of(theirs)
    assert (Path(back) / "tokenizer.json").is_file()


def _loaded(rank: int, kept: Path, name: str) -> dict[str, torch.Tensor]:
    with Runner.create(SHAPES[name], torch.device("cpu"), tensor_parallel_size=2) as runner:
        runner.load(kept)
        return export_huggingface(runner.model)


def test_what_convert_writes_loads_on_ranks_that_share_layers(tmp_path: Path) -> None:
    name, theirs, kept = "qwen3_moe", tmp_path / "theirs", tmp_path / "kept.ckpt"
    save_folder(SHAPES[name], theirs)
    assert main(["convert", str(theirs), str(kept)]) == 0
    expected = _tensors(theirs)
    for found in run_ranks(2, _loaded, kept, name):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)


def test_a_trainer_takes_what_convert_writes(tmp_path: Path) -> None:
    theirs, kept = tmp_path / "theirs", tmp_path / "kept.ckpt"
    save_folder(SHAPES["llama"], theirs)
    assert main(["convert", str(theirs), str(kept)]) == 0
    module = Own(rate=0.0)
    module.model_config = config_of(theirs)
    loader = Tokens().train_dataloader()
    trainer = make_trainer({}, limit_val_batches=1)
    (found,) = trainer.validate(module, loader, ckpt_path=kept, verbose=False)
    assert found["val_loss"] == pytest.approx(_loss(theirs), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "there"], "nowhere is not a folder: give one of Hugging Face"),
        (["empty", "there"], "checkpoint empty has no topology.json"),
        (["theirs", "full"], "full is not empty, and nothing is overwritten"),
        (["theirs", "there", "--dtype=int4"], "--dtype int4 is no type of weights: use float64"),
        (["theirs", "there", "--tokenizer=theirs"], "--tokenizer and --origin are for a folder"),
        (["theirs", "there", "--to=huggingface", "--max_shard_size=x"], "max_shard_size='x' is no"),
    ],
)
def test_what_cannot_be_converted_is_said_in_a_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_folder(SHAPES["llama"], tmp_path / "theirs")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full", "mine").touch()
    assert main(["convert", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("there").exists()
