"""Dropout after the embedding, of attention's weights and of results: counters say all of it.

So forward and backward drop the same, no plan changes a bit, and however many ranks share layers,
sequences or stages, they drop what one process does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.models import ModelConfig, import_huggingface
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of, differing
from tests.models.dense import DENSE, hugging_face_dense
from tests.models.llama import relative_error
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

STILL = DENSE["gpt2"]
DROPS = replace(STILL, hidden_dropout=0.1, embedding_dropout=0.2, attention_dropout=0.3)
ONLY_ATTENTION = replace(STILL, attention_dropout=0.3)
SAMPLES, LENGTH, PLANS = 4, 24, 12
BEGINS = ((0, 1, 5, 17), (0,), (0, 8, 12, 13, 16), (0, 23))
"""Where documents begin in each sample."""
Outcome = tuple[Tensor, dict[str, Tensor]]


def _batch(packed: bool) -> dict[str, Tensor]:
    batch = batch_of(STILL, SAMPLES, LENGTH)
    if packed:
        begins = torch.zeros(SAMPLES, LENGTH, dtype=torch.long)
        for sample, places in zip(begins, BEGINS, strict=True):
            sample[list(places)] = 1
        batch["segment_ids"] = begins.cumsum(1)
        plain = torch.arange(LENGTH).expand(SAMPLES, LENGTH)
        batch["position_ids"] = plain - torch.where(begins == 1, plain, 0).cummax(1).values
    return batch


def _runner(config: ModelConfig, **options: Any) -> Runner:
    runner = Runner.create(config, CPU, micro_batch_size=2, **options)
    import_huggingface(runner.model, hugging_face_dense(STILL).state_dict(), _config())
    optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
    runner.optimizer(optimizer, distributed_optimizer=False)
    return runner


@cache
def _config() -> dict[str, Any]:
    return dict(hugging_face_dense(STILL).config.to_dict())


def _train(runner: Runner, packed: bool, step: int = 0) -> Outcome:
    loss = runner.mean(runner.train(_batch(packed), step=step)).clone()
    return loss, {n: p.main_grad.clone() for n, p in runner.model.named_parameters()}


def _that_differ(runner: Runner, packed: bool) -> list[str]:
    """Plans that change a bit."""
    runner.use_plan("sequential", BUILDERS["sequential"])
    expected, wrong = _train(runner, packed), []
    builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(PLANS)}
    for name, builder in builders.items():
        runner.use_plan(name, builder)
        if found := differing(_train(runner, packed), expected):
            wrong.append(f"{name}: {found}")
    return wrong


def test_no_plan_changes_a_bit_and_evaluation_draws_nothing() -> None:
    batch = _batch(packed=True)
    with _runner(STILL) as still:
        expected = still.evaluate(batch), still.predict(batch)
        loss_of_all = _train(still, True)[0]
    with _runner(DROPS) as runner:
        assert _that_differ(runner, packed=False) == []
        assert _that_differ(runner, packed=True) == []
        assert torch.equal(runner.evaluate(batch), expected[0])
        assert torch.equal(runner.predict(batch), expected[1])
        loss, other = _train(runner, True)[0], _train(runner, True, step=1)[0]
        assert len({loss.item(), other.item(), loss_of_all.item()}) == 3
        assert torch.equal(_train(runner, True)[0], loss)


def test_backward_drops_what_forward_did() -> None:
    """A step along the gradient changes the loss by as much as the gradient says."""
    for config in (ONLY_ATTENTION, DROPS):
        with _runner(config) as runner:
            _, gradients = _train(runner, True)
            length = torch.stack([g.double().norm() ** 2 for g in gradients.values()]).sum().sqrt()
            step, losses = 0.02, []
            parameters = dict(runner.model.named_parameters())
            before = {name: p.detach().clone() for name, p in parameters.items()}
            for sign in (1, -1):
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        along = gradients[name] * (sign * step / length)
                        parameter.copy_(before[name] + along)
                losses.append(_train(runner, True)[0].double())
            slope = (losses[0] - losses[1]) / (2 * step)
            assert abs(slope - length) <= 1e-2 * length, (slope, length)


SIZES: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "ring": {"context_parallel_size": 2},
    "gathered": {"context_parallel_size": 2, "context_exchange": "all_gather"},
    "stages": {"pipeline_parallel_size": 2, "plan": "interleaved"},
}


def _on_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"wrong": []}
    for name, sizes in SIZES.items():
        with _runner(DROPS, **sizes) as runner:
            for packed in (False, True):
                found[f"{name} {packed}"] = _train(runner, packed)
            if name != "stages":
                found["wrong"] += [f"{name}: {plan}" for plan in _that_differ(runner, True)]
    return found


def test_ranks_drop_what_one_process_does() -> None:
    with _runner(DROPS) as runner:
        alone = {packed: _train(runner, packed) for packed in (False, True)}
    of_ranks = run_ranks(2, _on_rank)
    assert [found["wrong"] for found in of_ranks] == [[], []]
    with _runner(DROPS) as runner:
        split = _split(runner)
    for rank, found in enumerate(of_ranks):
        for name in SIZES:
            for packed, (expected_loss, expected) in alone.items():
                loss, gradients = found[f"{name} {packed}"]
                place = f"{name}, packed {packed}, rank {rank}"
                assert abs(loss - expected_loss) <= 1e-5 * expected_loss, place
                _check(gradients, expected, split if name == "tensor" else {}, rank, place)


def _split(runner: Runner) -> dict[str, int]:
    """Of the parameters that tensor-parallel ranks share out, along which dimension."""
    found: dict[str, int] = {}
    for name, parameter in runner.model.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            found[name] = parameter.partition_dim  # type: ignore[attr-defined]
    return found


def _check(
    found: dict[str, Tensor], expected: dict[str, Tensor], split: dict[str, int], rank: int, at: str
) -> None:
    """Gradients of this rank's parts, and of its stage's parameters."""
    for name, gradient in found.items():
        wanted = expected[name]
        if name in split and "word_embeddings" not in name:
            wanted = wanted.chunk(2, split[name])[rank]
        elif name in split:
            # The vocabulary is padded to a multiple of both ranks.
            rows = len(gradient)
            wanted = wanted[rank * rows : (rank + 1) * rows]
            gradient = gradient[: len(wanted)]
        assert relative_error(gradient, wanted) <= 1e-5, (name, at)
