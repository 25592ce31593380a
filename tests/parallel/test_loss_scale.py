"""fp16: the loss is scaled, by all ranks alike, and nothing but rounding tells so."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.loss_scale import LossScale, Scaling
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE

CONFIG = replace(SHAPE, num_layers=2)
EXPERTS = replace(CONFIG, num_experts=4, aux_loss_coefficient=0.1, z_loss_coefficient=0.01)
BAD = CONFIG.vocab_size - 1
"""The token that a batch begins with whose gradient is not finite."""
HALF: dict[str, Any] = {"precision": "16-mixed"}
FEW = Scaling(initial=256.0, interval=2)


def test_the_scale_is_that_of_torchs_scaler() -> None:
    numbers = {"growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 2}
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, **numbers)
    ours = LossScale(Scaling(64.0, 3.0, 0.25, 2), torch.device("cpu"))
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight])
    generator = torch.Generator().manual_seed(0)
    scales = []
    for _ in range(40):
        finite = torch.rand((), generator=generator) > 0.25
        weight.grad = torch.where(finite, 1.0, torch.inf).expand(2).clone()
        theirs.scale(torch.zeros(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        scales.append(float(ours.value))
        assert scales[-1] == theirs.get_scale()
    assert min(scales) < 64 < max(scales)


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ({"initial": 0.0}, "initial=0.0 must be positive"),
        ({"growth": 0.5}, "growth=0.5 must be at least 1"),
        ({"backoff": 1.0}, "backoff=1.0 must be between 0 and 1"),
        ({"interval": 0}, "interval=0 must be at least 1"),
    ],
)
def test_numbers_that_cannot_be(numbers: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Scaling(**numbers)


def _spoilt(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    value = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten()
    )
    return value * torch.inf if int(batch["tokens"][0, 0]) == BAD else value


def _batches(context: ParallelContext, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    topology = context.topology
    shape = (topology.dp_size, 2, 9)
    tokens = [
        torch.randint(BAD, shape, generator=generator).to(context.device) for _ in range(count)
    ]
    return [
        {"tokens": t[topology.dp_rank, :, :-1], "labels": t[topology.dp_rank, :, 1:]}
        for t in tokens
    ]


Numbers = tuple[list[float], list[float], dict[str, float]]


def _numbers(
    config: ModelConfig, sizes: dict[str, Any], scaling: Scaling | None, device: torch.device
) -> Numbers:
    """Losses and norms of two steps, and what is logged of experts."""
    precision = {} if scaling is None else HALF
    with Runner.create(config, device, **sizes, **precision) as runner:
        stepping = runner.optimizer(
            torch.optim.AdamW(runner.model.parameters(), lr=0.001), scaling=scaling
        )
        losses, norms = [], []
        for batch in _batches(runner.context, 2):
            losses.append(float(runner.mean(runner.train(batch))))
            norms.append(float(runner.grad_norm()))
            stepping.step()
        use = runner.expert_use
        logged = {} if use is None else {k: float(v.sum()) for k, v in use.losses.items()}
        return losses, norms, logged


def _place(rank: int, kind: str) -> tuple[torch.device, int]:
    """The device of a rank, and a model's width there: kernels of GPUs take no head of four."""
    if kind == "cpu":
        return CPU, CONFIG.hidden_size
    return torch.device(kind, rank), 16 * CONFIG.num_attention_heads


def same_numbers(
    rank: int, cases: list[tuple[ModelConfig, dict[str, Any]]], kind: str = "cpu"
) -> None:
    device, width = _place(rank, kind)
    for config, sizes in cases:
        config = replace(config, hidden_size=width)
        if kind != "cpu" and config.num_experts:
            # Of what is drawn there some scores are so close that rounding would choose.
            config = replace(config, experts_per_token=config.num_experts)
        expected = _numbers(config, sizes, None, device)
        large, small = (_numbers(config, sizes, Scaling(2.0**k), device) for k in (10, 0))
        for found in (large, small):
            for one, other in zip(found[:2], expected[:2], strict=True):
                assert one == pytest.approx(other, rel=2e-2), (found, expected)
            assert found[2] == pytest.approx(expected[2], rel=2e-2)
        assert large[0] == pytest.approx(small[0], rel=1e-3), "the loss that is told is not scaled"
        assert bool(expected[2]) == (config.num_experts is not None)


TP, PP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}


CASES: dict[int, list[tuple[ModelConfig, dict[str, Any]]]] = {
    1: [(CONFIG, {}), (EXPERTS, {})],
    2: [(CONFIG, {}), (CONFIG, TP), (CONFIG, PP), (EXPERTS, {"expert_parallel_size": 2})],
}


@pytest.mark.parametrize(("world", "cases"), CASES.items())
def test_numbers_are_those_of_fp32(world: int, cases: list[Any]) -> None:
    run_ranks(world, same_numbers, cases)


def overflow(rank: int, kind: str = "cpu") -> tuple[list[float], list[bool], int, list[str]]:
    """One rank's gradient is infinite in one step, and the scale grows after two others."""
    scales, changed, said = [], [], []
    device, width = _place(rank, kind)
    config = replace(CONFIG, hidden_size=width)
    with Runner.create(config, device, loss=_spoilt, **HALF) as runner:
        topology = runner.context.topology
        stepping = runner.optimizer(
            torch.optim.AdamW(runner.model.parameters(), lr=0.01), scaling=FEW
        )
        for step, batch in enumerate(_batches(runner.context, 6)):
            if step == 3 and topology.dp_rank == topology.dp_size - 1:
                batch["tokens"][0, 0] = BAD
            before = [p.clone() for p in runner.model.parameters()]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                runner.train(batch)
                stepping.clip_by_norm(1.0)
                stepping.step()
            said += [str(w.message) for w in caught if "left out" in str(w.message)]
            after = list(runner.model.parameters())
            changed.append(not all(map(torch.equal, before, after)))
            assert runner.loss_scale is not None
            scales.append(float(runner.loss_scale))
        return scales, changed, runner.skipped_steps, said


def check_overflow(of_ranks: list[Any]) -> None:
    first, *others = of_ranks
    scales, changed, skipped, said = first
    assert scales == [256.0, 512.0, 512.0, 256.0, 256.0, 512.0]
    assert changed == [step != 3 for step in range(6)]
    assert skipped == 1
    assert said == [
        "step 3 was left out: its loss or gradient is not finite (1 in all); the loss is scaled by"
        " 256 from now on"
    ]
    assert all(other[:3] == first[:3] and not other[3] for other in others)


@pytest.mark.parametrize("world", [1, 2])
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(world: int) -> None:
    check_overflow(run_ranks(world, overflow))


def test_a_smaller_scale_is_looked_for_and_a_loss_that_has_none_ends_the_run() -> None:
    with Runner.create(CONFIG, "cpu", loss=_spoilt, **HALF) as runner, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stepping = runner.optimizer(
            torch.optim.AdamW(runner.model.parameters(), lr=0.01),
            scaling=Scaling(initial=16.0),
            max_skipped_steps=3,
        )
        (batch,) = _batches(runner.context, 1)
        batch["tokens"][0, 0] = BAD
        with pytest.raises(FloatingPointError, match="max_skipped_steps=3"):
            for _ in range(20):
                runner.train(batch)
                stepping.step()
        assert runner.skipped_steps == 7, "to scales of 8, 4, 2 and 1, and three more"


def test_a_checkpoint_has_the_scale(tmp_path: Path) -> None:
    def run(first: int, last: int) -> tuple[list[Any], list[float]]:
        with Runner.create(CONFIG, "cpu", **HALF) as runner:
            stepping = runner.optimizer(
                torch.optim.AdamW(runner.model.parameters(), lr=0.01), scaling=FEW
            )
            batches = _batches(runner.context, 5)
            if first:
                runner.load(tmp_path / "saved")
            scales = []
            for step in range(first, last):
                runner.train(batches[step], step=step)
                stepping.step()
                assert runner.loss_scale is not None
                scales.append(float(runner.loss_scale))
            if not first:
                runner.save(tmp_path / "saved")
            return [p.detach().clone() for p in runner.model.parameters()], scales

    run(0, 3)
    resumed, scales = run(3, 5)
    expected, all_scales = run(0, 5)
    assert scales == all_scales[3:] == [1024.0, 1024.0]
    assert all(map(torch.equal, resumed, expected))
