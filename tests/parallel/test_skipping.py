"""A step that is not finite on any rank is as if its batch had not been there, on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dhellam.parallel import skipping
from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE

CONFIG = replace(SHAPE, num_layers=2)
BAD = CONFIG.vocab_size - 1
"""The token that a batch begins with whose loss or gradient is not finite."""
STEPS, SPOILT = 5, 2


class Counting(Optimizer):
    """Counts its steps in numbers and in a list of tensors, which decide what it does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01, "steps": 0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                sums = state.setdefault("sums", [torch.zeros_like(p), {"last": torch.zeros(())}])
                sums[0].add_(p.grad)
                sums[1]["last"] = p.grad.max()
                p.sub_(sums[0], alpha=group["lr"] / state["count"])


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "counting": Counting,
}


def _spoilt(kind: str) -> Any:
    def loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        if int(batch["tokens"][0, 0]) != BAD:
            return value
        return {
            "loss and gradient": lambda: value * torch.inf,
            "loss": lambda: value + torch.inf,
            "gradient": lambda: value + (logits.flatten()[0] * 0).sqrt(),
        }[kind]()

    return loss


def _state(runner: Runner) -> list[Any]:
    assert runner._training is not None
    return [*runner.model.parameters(), *_leaves(runner._training.optimizer.state_dict())]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value.detach().clone() if isinstance(value, Tensor) else value]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _run(rank: int, case: tuple[Any, ...], spoil: bool) -> tuple[list[Any], int, list[bool]]:
    optimizer, kind, sizes, options, clip = case
    generator = torch.Generator().manual_seed(1)
    finite = []
    with Runner.create(CONFIG, "cpu", loss=_spoilt(kind), **sizes) as runner:
        topology = runner.context.topology
        stepping = runner.optimizer(OPTIMIZERS[optimizer](runner.model.parameters()), **options)
        for step in range(STEPS):
            shape = (topology.dp_size, 2, 9)
            tokens = torch.randint(BAD, shape, generator=generator)[topology.dp_rank]
            if step == SPOILT and not spoil:
                continue
            if step == SPOILT and topology.dp_rank == topology.dp_size - 1:
                tokens[0, 0] = BAD
            runner.train({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, step=step)
            if clip == "value":
                stepping.clip_by_value(0.1)
            elif clip == "norm":
                finite.append(bool(runner.grad_norm().isfinite()))
                stepping.clip_by_norm(0.5)
            stepping.step()
        return _state(runner), runner.skipped_steps, finite


DP: dict[str, Any] = {}
TP, PP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
MIXED = {"precision": "bf16-mixed"}
WHOLE = {"distributed_optimizer": False}
CASES: dict[int, list[tuple[Any, ...]]] = {
    1: [
        ("adamw", "loss and gradient", MIXED, {}, "norm"),
        ("fused", "gradient", DP, {}, "value"),
        ("sgd", "loss", DP, {}, "norm"),
        ("plain sgd", "gradient", DP, {}, None),
        ("counting", "gradient", MIXED, {}, "norm"),
    ],
    2: [
        ("adamw", "loss and gradient", DP | MIXED, {}, "norm"),
        ("fused", "loss", DP, {}, None),
        ("adamw", "loss", DP | MIXED, WHOLE, None),
        ("sgd", "gradient", DP, {}, "value"),
        ("adamw", "gradient", TP, {}, "norm"),
        ("fused", "loss", PP, {}, None),
    ],
}


def _all(rank: int, world: int) -> list[tuple[Any, ...]]:
    skipping._PART = 100  # so that a step has several parts
    found = []
    for case in CASES[world]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            spoilt, skipped, finite = _run(rank, case, spoil=True)
        told = [str(w.message) for w in said if "left out" in str(w.message)]
        expected, none, _ = _run(rank, case, spoil=False)
        same = len(spoilt) == len(expected) and all(map(_same, spoilt, expected))
        found.append((same, skipped, none, finite, told))
    return found


@pytest.mark.parametrize("world", CASES)
def test_a_step_that_is_not_finite_changes_nothing(world: int) -> None:
    for rank, outcomes in enumerate(run_ranks(world, _all, world)):
        for case, (same, skipped, none, finite, told) in zip(CASES[world], outcomes, strict=True):
            assert same, case
            assert (skipped, none) == (1, 0), case
            if case[4] == "norm":
                assert finite == [step != SPOILT for step in range(STEPS)], case
            text = f"step {SPOILT} was left out: its loss or gradient is not finite"
            assert len(told) == (rank == 0), case
            assert all(text in line for line in told)


def _lost(rank: int, world: int, first: int) -> tuple[int, str, bool]:
    """Nothing is finite from a step on: the step that ends the run, what it says, the weights."""
    with Runner.create(CONFIG, "cpu", loss=_spoilt("loss and gradient")) as runner:
        stepping = runner.optimizer(
            torch.optim.AdamW(runner.model.parameters()), max_skipped_steps=3
        )
        for step in range(10):
            tokens = torch.ones(2, 8, dtype=torch.long)
            if step >= first and rank == world - 1:
                tokens[0, 0] = BAD
            runner.train({"tokens": tokens, "labels": tokens})
            try:
                stepping.step()
            except FloatingPointError as error:
                good = all(bool(p.isfinite().all()) for p in runner.model.parameters())
                return step, str(error), good
    return 10, "", False


@pytest.mark.parametrize("first", [0, 2])
def test_a_run_of_nothing_else_ends_on_all_ranks(first: int) -> None:
    for step, text, good in run_ranks(2, _lost, 2, first):
        assert step == first + 3
        assert "3 steps in a row" in text and "max_skipped_steps=3" in text
        assert good


def _weights(optimizer: Optimizer) -> Tensor:
    """The weights after three steps, of which the second is left out."""
    (weight,) = optimizer.param_groups[0]["params"]
    stepping = skipping.SkippingOptimizer(optimizer, weight.device)
    for value in (0.5, float("inf"), 0.25):
        weight.grad = torch.full_like(weight, value)
        stepping.finite = weight.grad.isfinite().all()
        stepping.step()
    return weight.detach()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_gpu_steps_by_the_fused_form_unless_the_user_says_otherwise(kind: Any) -> None:
    def made(device: str, **options: Any) -> Optimizer:
        optimizer = kind([torch.nn.Parameter(torch.ones(9))], lr=0.1, **options)
        skipping.prefer_fused(optimizer, torch.device(device))
        return optimizer

    left = made("cuda")  # its parameters are on the CPU, where the fused form works as well
    assert torch.equal(_weights(left), _weights(made("cpu", fused=True)))
    left.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    assert all(group["fused"] for group in left.param_groups)
    for device, options in (("cpu", {}), ("cuda", {"fused": False}), ("cuda", {"foreach": True})):
        (group,) = made(device, **options).param_groups
        assert not group["fused"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_on_a_gpu_a_step_is_left_out_as_on_a_cpu(kind: Any) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        weight = torch.nn.Parameter(torch.ones(4099, device=device))
        optimizer = kind([weight], lr=0.1)
        skipping.prefer_fused(optimizer, weight.device)
        found[device] = _weights(optimizer).cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"])
