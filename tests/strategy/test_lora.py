"""Adapters under Trainers: trained alone, under every strategy, saved, and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dhellam import LanguageModel
from lightning_dhellam.commands.fit import run_lightning
from lightning_dhellam.commands.main import main
from lightning_dhellam.models import LoRA
from tests.strategy.runs import OF_TEXT, Losses, Model, loader, make_trainer, words_of_a_run

LORA = LoRA(rank=2, alpha=8)


class Adapted(Model):
    """Of which adapters are trained."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(learning_rate=0.05, **changes)
        self.lora = LORA


def _fit(
    folder: Path | None,
    steps: int,
    resume: Path | None = None,
    strategy: Any = None,
    **options: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the weights in the end."""
    losses = Losses()
    callbacks: list[Any] = [losses]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2))
    chosen = {"micro_batch_size": 4} if strategy is None else strategy
    trainer = make_trainer(
        chosen, callbacks, max_steps=steps, enable_checkpointing=folder is not None, **options
    )
    module = Adapted()
    trainer.fit(module, loader(chosen), ckpt_path=resume)
    return losses.values, {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_goes_on_bit_for_bit(precision: str, tmp_path: Path) -> None:
    whole, expected = _fit(None, 4, precision=precision)
    assert whole[-1] < whole[0]
    _fit(tmp_path, 2, precision=precision)
    rest, found = _fit(None, 4, tmp_path / "step=2.ckpt", precision=precision)
    assert rest == whole[2:]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_strategies_train_the_same_adapters() -> None:
    ours, mine = _fit(None, 3)
    theirs, other = _fit(None, 3, strategy="auto")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[2] < ours[0]
    frozen = [name for name in mine if ".lora." not in name]
    assert frozen and all(torch.equal(mine[name], other[name]) for name in frozen)


def test_the_command_takes_adapters_from_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "fit",
        *words_of_a_run(tmp_path),
        f"--model.overrides={OF_TEXT}",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
    ]
    trainer = run_lightning([*words, "--model.lora.rank=4", "--model.lora.targets=[q_proj]"], False)
    module = trainer.lightning_module
    assert isinstance(module, LanguageModel) and module.lora is not None
    assert (module.lora.rank, module.lora.targets) == (4, ("q_proj",))
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all(".linear_qkv.lora." in name for name in trained)
    assert main([*words, "--model.lora.targets=[q_porj]"]) == 2
    assert "did you mean 'q_proj'?" in capsys.readouterr().err
