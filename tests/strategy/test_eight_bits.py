"""`DHellamStrategy(fp8=...)`: trains, resumes bit for bit, and says early what it cannot do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TransformerEnginePrecision

from lightning_dhellam.strategy import DHellamStrategy
from lightning_dhellam.strategy.precision import DHellamPrecision
from tests.ranks import run_ranks
from tests.strategy.runs import Losses, Model, join, loader, make_trainer

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
