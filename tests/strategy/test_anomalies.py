"""`detect_anomaly` names the operator that was the first to make a step not finite."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.parallel.loss_scale import Scaling
from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Model, loader, make_trainer

CONFIG = replace(SHAPE, num_layers=4)
FC1 = "layers.{}.mlp.linear_fc1.weight"
SPOILT = 2
"""The step that is not finite."""


def _plant(model: torch.nn.Module, name: str, value: float) -> None:
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        parameter[0, 0] = value


class Planted(Model):
    """Has a NaN in a weight of its second layer from a step on."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == SPOILT:
            _plant(self.model, FC1.format(1), torch.nan)


class Rising(Model):
    """A loss whose gradient is infinite in one batch, and which is finite."""

    def compute_loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        is_spoilt = 8 * SPOILT + 3 in batch["index"].tolist()  # in the second micro-batch
        return value + (logits.flatten()[0] * 0).sqrt() if is_spoilt else value


class Hooked(Model):
    """Spoils the last gradient between the operators and the optimizer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == SPOILT:
            optimizer.param_groups[0]["params"][-1].grad.view(-1)[0] = self.value
        super().on_before_optimizer_step(optimizer)


def _fit(module: Model, detect_anomaly: bool | str, **options: Any) -> None:
    sizes = {"micro_batch_size": 2, "detect_anomaly": detect_anomaly}
    make_trainer(sizes, max_steps=4, **options).fit(module, loader(sizes))


WEIGHT = (
    rf"step {SPOILT} is not finite: operator forward/fc1.gemm of layer 1, micro-batch 0 on rank 0"
    r" made it first, in '\w+', where parameter 'model.layers.1.mlp.linear_fc1.weight' is not"
    r" finite itself"
)
CASES: dict[str, tuple[Callable[[], Model], str]] = {
    "weight": (Planted, WEIGHT),
    "backward": (
        Rising,
        rf"step {SPOILT} is not finite: operator backward/[\w.]+ of head, micro-batch 1 on rank 0"
        " made it first, in 'd_",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_made_a_step_not_finite_ends_the_run_by_name(case: str) -> None:
    make, text = CASES[case]
    with pytest.raises(FloatingPointError, match=text):
        _fit(make(), detect_anomaly=True)


SPOILING: dict[str, tuple[float, dict[str, Any]]] = {
    "unclipped": (torch.inf, {}),
    "clipped by norm": (torch.nan, {"gradient_clip_val": 1.0}),  # all are NaN afterwards
    "clipped by value": (  # none is infinite afterwards
        torch.inf,
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
    ),
}


@pytest.mark.parametrize("case", SPOILING)
def test_a_gradient_that_was_spoilt_has_its_name_however_it_is_clipped(case: str) -> None:
    value, clipping = SPOILING[case]
    module = Hooked(value)
    with pytest.raises(FloatingPointError) as caught:
        _fit(module, True, **clipping)
    *_, (last, _) = module.named_parameters()
    assert (
        f"step {SPOILT} is not finite: its operators have made nothing such; the gradient of"
        f" '{last}' became so on rank 0 between them and the optimizer"
    ) in str(caught.value)


def test_lightnings_own_flag_means_the_same() -> None:
    with pytest.raises(FloatingPointError, match=WEIGHT):
        make_trainer({"micro_batch_size": 2}, max_steps=4, detect_anomaly=True).fit(
            Planted(), loader({})
        )


def test_a_run_goes_on_where_it_is_only_told() -> None:
    module = Rising()
    with pytest.warns(UserWarning, match=CASES["backward"][1]):
        _fit(module, detect_anomaly="warn")
    assert module.trainer.global_step == 4
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_a_step_is_the_same_while_it_is_watched() -> None:
    watched, plain = Model(), Model()
    _fit(watched, detect_anomaly=True)
    _fit(plain, detect_anomaly=False)
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def _half(detect_anomaly: bool | str, **cast: Any) -> list[str]:
    """What is said of 12 steps of fp16, whose scale begins as high as it can."""
    generator = torch.Generator().manual_seed(1)
    with (
        Runner.create(CONFIG, "cpu", precision="16-mixed") as runner,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        optimizer = runner.optimizer(
            torch.optim.AdamW(runner.model.parameters()),
            scaling=Scaling(initial=2.0**30),
            detect_anomaly=detect_anomaly,
        )
        if cast:
            _plant(runner.model, **cast)
        for _ in range(12):
            tokens = torch.randint(CONFIG.vocab_size, (2, 9), generator=generator)
            runner.train({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
            optimizer.step()
        runner.settle()
        return [str(w.message) for w in said if "is not finite: operator" in str(w.message)]


def test_the_search_for_a_scale_ends_no_run() -> None:
    told = _half(detect_anomaly=True)
    assert told and all("operator backward/" in text for text in told)
    with pytest.raises(FloatingPointError, match=r"operator forward/fc1.gemm of layer 2"):
        _half(detect_anomaly=True, name=FC1.format(2), value=torch.inf)


PLACES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "one of two tensor-parallel ranks": (
        {"tensor_parallel_size": 2},
        1,
        FC1.format(2),
        r"operator forward/fc1.gemm of layer 2, micro-batch 0 on rank 1 made it first",
    ),
    # The fold gives the second stage the layers in the middle.
    "the second stage": (
        {"pipeline_parallel_size": 2},
        1,
        FC1.format(1),
        r"operator forward/fc1.gemm of layer 1, micro-batch 0 on rank 1 made it first",
    ),
    "the second replica": (
        {},
        1,
        FC1.format(3),
        r"operator forward/fc1.gemm of layer 3, micro-batch 0 on rank 1 made it first",
    ),
}


def _spoilt(rank: int) -> dict[str, str]:
    """What each of two ranks says, of which one has planted a NaN in its own part of a weight."""
    said = {}
    for name, (sizes, spoils, weight, _) in PLACES.items():
        with Runner.create(CONFIG, "cpu", **sizes) as runner:
            optimizer = runner.optimizer(
                torch.optim.AdamW(runner.model.parameters()), detect_anomaly=True
            )
            if rank == spoils:
                _plant(runner.model, weight, torch.nan)
            tokens = torch.arange(4 * 9).view(4, 9) % CONFIG.vocab_size
            runner.train({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
            with pytest.raises(FloatingPointError) as caught:
                optimizer.step()
            said[name] = str(caught.value)
    return said


def test_all_ranks_name_the_rank_where_it_began() -> None:
    first, second = run_ranks(2, _spoilt)
    assert first == second
    for name, (*_, text) in PLACES.items():
        assert re.search(text, first[name]), first[name]
