"""`DHellamStrategy(fp8=...)`: trains, resumes bit for bit, and says early what it cannot do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TransformerEnginePrecision

from lightning_dhellam.engine.lanes import CpuLanes
from lightning_dhellam.strategy import DHellamStrategy
from lightning_dhellam.strategy.precision import DHellamPrecision
from tests.pipeline.test_rehearsal import Launches
from tests.ranks import run_ranks
from tests.strategy.runs import GLOBAL_BATCH, LENGTH, Losses, Model, join, loader, make_trainer

WIDE = {"hidden_size": 128, "ffn_hidden_size": 128, "init_std": 0.03}
EMULATED: dict[str, Any] = {"kernels": {"fp8": "reference"}, "micro_batch_size": 3}


def _transformer_engine(**changes: Any) -> TransformerEnginePrecision:
    """Lightning's plugin, as its constructor leaves it where transformer-engine is installed."""
    plugin = object.__new__(TransformerEnginePrecision)
    plugin.weights_dtype, plugin.recipe = torch.bfloat16, SimpleNamespace()
    vars(plugin).update(changes)
    return plugin


def _fit(folder: Path | None, steps: int, fp8: str | None, **options: Any) -> Any:
    losses, module, resumed = Losses(), Model(**WIDE), options.pop("ckpt_path", None)
    kept = [] if folder is None else [ModelCheckpoint(folder, filename="kept")]
    strategy = EMULATED | {"fp8": fp8}
    trainer = make_trainer(
        strategy, [losses, *kept], max_steps=steps, enable_checkpointing=bool(kept), **options
    )
    trainer.fit(module, loader(strategy, samples=40), ckpt_path=resumed)
    return losses.values, {name: p.detach().clone() for name, p in module.named_parameters()}


def _runs(rank: int, folder: Path) -> dict[str, Any]:
    join(rank, 1)
    found = {}
    for name in ("current", "blockwise"):
        options: dict[str, Any] = {"precision": "bf16-mixed"}
        found[name] = _fit(folder / name, 3, name, **options)[0]
        found[f"{name} resumed"] = _fit(
            None, 5, name, ckpt_path=folder / name / "kept.ckpt", **options
        )
        found[f"{name} straight"] = _fit(None, 5, name, **options)
    found["plain"] = _fit(None, 5, None, precision="bf16-mixed")
    found["transformer-engine"] = _fit(None, 5, None, plugins=[_transformer_engine()])
    return found


def test_training_in_8_bits_follows_16_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _runs, tmp_path)
    for name in ("current", "blockwise"):
        (losses, weights), (after, resumed) = found[f"{name} straight"], found[f"{name} resumed"]
        assert found[name] + after == losses
        assert all(torch.equal(resumed[n], weight) for n, weight in weights.items())
        assert losses != found["plain"][0] and losses[-1] < losses[0]
        torch.testing.assert_close(losses, found["plain"][0], rtol=0.02, atol=0.0)
    assert found["transformer-engine"][0] == found["current straight"][0]


@pytest.mark.parametrize(
    ("arguments", "shape", "flags", "message"),
    [
        ({"fp8": "delayed"}, {}, {}, "fp8='delayed' must be one of current, blockwise, or None"),
        ({"fp8": "current"}, WIDE, {}, "the device is cpu: leave fp8 out, or let it be emulated"),
        (EMULATED | {"fp8": "blockwise"}, {}, {}, "hidden_size has 16: use another size"),
        (
            EMULATED | {"fp8": "current"},
            WIDE | {"num_experts": 4, "experts_per_token": 2},
            {},
            "experts have no GEMMs in 8 bits here",
        ),
    ],
    ids=["name", "device", "size", "experts"],
)
def test_what_cannot_be_is_refused_before_any_process_computes(
    arguments: dict[str, Any], shape: dict[str, Any], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        trainer = make_trainer(arguments, precision="bf16-mixed", **flags)
        trainer.fit(Model(**shape), loader(arguments))
    assert message in str(error.value)


def test_lightnings_spelling_means_current() -> None:
    ours = DHellamPrecision.of(_transformer_engine())
    assert (ours.precision, ours.fp8) == ("bf16-mixed", "current")
    assert DHellamStrategy(precision_plugin=_transformer_engine()).fp8 == "current"
    explicit = DHellamStrategy(precision_plugin=_transformer_engine(), fp8="blockwise")
    assert explicit.fp8 == "blockwise" and DHellamStrategy().fp8 is None
    with pytest.raises(ValueError, match="'transformer-engine-float16' does not work with"):
        DHellamPrecision.of(_transformer_engine(weights_dtype=torch.float16))
    with pytest.raises(ValueError, match="which scales 8 bits without a history"):
        DHellamPrecision.of(_transformer_engine(recipe=SimpleNamespace(margin=1)))


class Data(LightningDataModule):
    """What says of itself how large its batches are."""

    batch_size, sequence_length = GLOBAL_BATCH, LENGTH

    def train_dataloader(self) -> Any:
        return loader(EMULATED, samples=24)


class Launched(Callback):
    """How many launches were new in a step, and whether there was a rehearsal before the first."""

    def __init__(self, launches: Launches) -> None:
        self.launches = launches
        self.before = False

    def on_train_start(self, *_: Any) -> None:
        self.before = bool(self.launches.rehearsed)


class OwnLoss(Model):
    """A model with a loss of its own, which may read what only real batches have."""

    def compute_loss(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return logits.float().square().mean() + batch["index"].sum() * 0.0


def _first_steps(rank: int) -> dict[str, Any]:
    join(rank, 1)
    found: dict[str, Any] = {}

    def fit(module: Model, fp8: str | None, data: Any) -> tuple[Any, ...]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            launches = Launches(monkeypatch)
            losses, launched = Losses(), Launched(launches)
            given = EMULATED | {"fp8": fp8}
            trainer = make_trainer(given, [losses, launched], max_steps=3, precision="bf16-mixed")
            trainer.fit(module, data)
            return losses.values, launched.before, launches.new

    for loads in (False, True):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(CpuLanes, "loads", loads)
            for fp8 in ("current", "blockwise"):
                found[f"{fp8} {loads}"] = fit(Model(**WIDE), fp8, Data())
            found[f"plain {loads}"] = fit(Model(**WIDE), None, Data())
            found[f"unknown {loads}"] = fit(Model(**WIDE), "current", loader(EMULATED, samples=24))
            found[f"own loss {loads}"] = fit(OwnLoss(**WIDE), "current", Data())
    return found


def test_kernels_of_8_bits_are_launched_before_the_first_step_and_change_nothing() -> None:
    (found,) = run_ranks(1, _first_steps)
    for name in ("current", "blockwise"):
        losses, before, new = found[f"{name} True"]
        assert before and new == [], "a step launches what was not rehearsed"
        assert losses == found[f"{name} False"][0], "a rehearsal has left something"
    for name, (_, before, new) in found.items():
        if name not in ("current True", "blockwise True"):
            assert not before and new, name
    for name in ("plain", "unknown", "own loss"):
        assert found[f"{name} True"][0] == found[f"{name} False"][0]
