"""Weight decay by kinds of parameters, and the learning rate of every step, by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_wsd_schedule

from lightning_dhellam import LanguageModel
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.optimizing import SCHEDULES, Schedule, decay_groups
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import SMALL
from tests.strategy.runs import loader, make_trainer

EXACT: dict[str, tuple[Schedule, int, list[float]]] = {
    "linear": (Schedule("linear", 2, 0.5), 6, [1 / 3, 2 / 3, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5]),
    "constant": (Schedule("constant", 3), 6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
    "cosine": (
        Schedule("cosine", 1, 0.0),
        5,
        [0.5, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0, 0.0],
    ),
    "wsd": (Schedule("wsd", 2, 0.0, 4), 10, [1 / 3, 2 / 3, *[1.0] * 5, 0.75, 0.5, 0.25, 0.0, 0.0]),
    "wsd-tenth": (Schedule("wsd", 0, 0.1), 20, [*[1.0] * 19, 0.55, 0.1]),
    "wsd-all-decay": (Schedule("wsd", 0, 0.0, 2), 2, [1.0, 0.5, 0.0]),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_step_has_its_exact_rate(name: str) -> None:
    schedule, total, expected = EXACT[name]
    found = [schedule.factor(step, total) for step in range(len(expected))]
    assert found == pytest.approx(expected, abs=1e-12)
    assert {case.partition("-")[0] for case in EXACT} == SCHEDULES.keys()


def test_wsd_goes_down_as_transformers_does() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options: dict[str, Any] = {"decay_type": "linear", "min_lr_ratio": 0.2}
    theirs: LambdaLR = get_wsd_schedule(optimizer, 0, 6, num_stable_steps=9, **options)
    ours = Schedule("wsd", 0, 0.2, 6)
    for step in range(17):
        assert ours.factor(step, 15) == pytest.approx(theirs.lr_lambdas[0](step)), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_without_an_end_stays_at_the_highest(name: str) -> None:
    schedule = Schedule(name, 1)
    assert [schedule.factor(step, math.inf) for step in (0, 1, 10**6)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, "schedule='cosin' is not known: use one of cosine, linear, const"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is negative"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio=1.5 must be from 0 to 1"),
        ({"decay_steps": 5}, "decay_steps=5 is of schedule='wsd', and schedule is 'cosine'"),
        ({"schedule": "wsd", "decay_steps": 0}, "decay_steps=0 is not positive"),
    ],
)
def test_what_no_schedule_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(**changes)


def test_more_steps_than_the_run_has_are_refused() -> None:
    module = LanguageModel("llama-tiny", SHAPE, schedule="wsd", warmup_steps=2, decay_steps=3)
    with pytest.raises(ValueError, match="warmup_steps=2 and decay_steps=3 are more than the 4 st"):
        make_trainer("auto", max_steps=4).fit(module, loader("auto"))


def _decayed(config: ModelConfig, **options: bool) -> tuple[set[str], set[str]]:
    model = CausalLM(config, ParallelContext.single(torch.device("cpu")))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = decay_groups(model, 0.1, **options)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    return {names[id(p)] for p in decayed["params"]}, {names[id(p)] for p in kept["params"]}


def test_norms_and_biases_are_not_decayed_and_embeddings_by_choice() -> None:
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=64,
        max_sequence_length=64,
        attention_bias=True,
        qk_norm=True,
        num_experts=2,
    )
    decayed, kept = _decayed(config)
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed), decayed
    assert all("norm" in name or "bias" in name for name in kept), kept
    embedding = {name for name in decayed if "embedding" in name}
    assert len(embedding) == 1 and any("router" in name for name in decayed)
    assert _decayed(config, decay_embeddings=False) == (decayed - embedding, kept | embedding)


SHAPE = {
    "num_layers": 2,
    "hidden_size": SMALL.hidden_size,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 32,
    "max_sequence_length": 16,
}


class Rates(Callback):
    """The learning rate that each step has taken; ends a run early where asked."""

    def __init__(self, stop: int = 0) -> None:
        self.values: list[float] = []
        self.stop = stop

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.values.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or len(self.values) == self.stop


def test_a_resumed_run_has_the_same_rates_and_weights(tmp_path: Path) -> None:
    def fit(stop: int = 0, ckpt_path: Path | None = None) -> tuple[list[float], dict[str, Tensor]]:
        rates = Rates(stop)
        callbacks: list[Callback] = [rates]
        if stop:
            callbacks.append(ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=stop))
        strategy = {"micro_batch_size": 4}
        module = LanguageModel(
            "llama-tiny", SHAPE, learning_rate=0.01, schedule="wsd", warmup_steps=1, decay_steps=3
        )
        options: dict[str, Any] = {"max_steps": 6, "enable_checkpointing": stop > 0}
        trainer = make_trainer(strategy, callbacks, **options)
        trainer.fit(module, loader(strategy), ckpt_path=ckpt_path)
        return rates.values, {
            k: v.clone() for k, v in module.model.state_dict().items() if v is not None
        }

    rates, weights = fit()
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.007, 0.004])
    first, _ = fit(stop=4)
    second, resumed = fit(ckpt_path=tmp_path / "kept.ckpt")
    assert [*first, *second] == rates
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
