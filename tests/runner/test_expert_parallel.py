"""However many ranks share the experts: loss, gradients and logits are Hugging Face's, fp32.

A model with a shared expert, which none of its families has here, is compared with Megatron-core's
own modules under autograd in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import ModelConfig, export_huggingface, import_huggingface
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of
from tests.models.llama import relative_error, token_losses
from tests.models.mixtures import MIXTURES, hugging_face_mixture
from tests.ranks import run_ranks

SAMPLES, LENGTH = 4, 16


@dataclass(frozen=True)
class Case:
    """A model, and how many ranks share what of it.

    Attributes:
        sizes: of parallelism.
        options: others of the runner.
        family: of the model.
    """

    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "mixtral"

    @property
    def config(self) -> ModelConfig:
        """Of the model; four layers where there are stages."""
        config = MIXTURES[self.family]
        if "pipeline_parallel_size" in self.sizes:
            return replace(config, num_layers=4)
        return config


def _ep(size: int, **others: int) -> dict[str, int]:
    sizes = {f"{name}_parallel_size": other for name, other in others.items()}
    return {"expert_parallel_size": size, **sizes}


CASES: dict[int, dict[str, Case]] = {
    1: {
        "alone": Case(_ep(1)),
        "dense-between": Case(_ep(1), {"plan": "dhellam"}, "qwen3-moe"),
        "two-step": Case(_ep(1), {}, "phi-moe"),
    },
    2: {
        "experts": Case(_ep(2)),
        "dense-between": Case(_ep(2), {"plan": "megatron"}, "qwen3-moe"),
        "two-step": Case(_ep(2), {"plan": "dhellam"}, "phi-moe"),
        "split": Case(_ep(1, tensor=2)),
        "whole-experts-each": Case(_ep(1, tensor=2, expert_tensor=1)),
        "over-tensor-ranks": Case(_ep(2, tensor=2, expert_tensor=1)),
    },
    4: {
        "one-expert-each": Case(_ep(4)),
        "split": Case(_ep(2, tensor=2), {"plan": "megatron"}),
        "whole": Case(_ep(2, tensor=2, expert_tensor=1)),
        "over-all": Case(_ep(4, tensor=2, expert_tensor=1), {"regather": False}),
        "stages": Case(_ep(2, pipeline=2), {"plan": "dhellam"}),
        "replicas": Case(_ep(2), {}, "qwen3-moe"),
        "sequences": Case(_ep(2, context=2)),
    },
}
Outcome = tuple[Tensor, dict[str, Tensor], Tensor, Tensor]
"""Loss, gradients, loss in evaluation of this rank's samples, their logits."""


def _batch(config: ModelConfig) -> dict[str, Tensor]:
    batch = batch_of(config, SAMPLES, LENGTH)
    generator = torch.Generator().manual_seed(2)
    batch["loss_mask"] = torch.rand(SAMPLES, LENGTH, generator=generator)
    return batch


def started(
    case: Case, device: torch.device = CPU, *, config: ModelConfig | None = None, **options: Any
) -> Runner:
    """A runner with Hugging Face's weights and an optimizer that leaves gradients whole.

    Of the model of `config`, if that is not to be the case's own.
    """
    config = config or case.config
    options = {**case.options, **options}
    runner = Runner.create(config, device, micro_batch_size=1, **case.sizes, **options)
    import_huggingface(runner.model, hugging_face_mixture(config).state_dict())
    optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
    runner.optimizer(optimizer, distributed_optimizer=False)
    return runner


def _own(runner: Runner, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    topology = runner.context.topology
    return {n: x.chunk(topology.dp_size)[topology.dp_rank] for n, x in batch.items()}


def gradients_of(runner: Runner) -> dict[str, Tensor]:
    return {name: p.main_grad.clone() for name, p in runner.model.named_parameters()}


def _outcome(case: Case, device: torch.device) -> Outcome:
    with started(case, device) as runner:
        batch = _own(runner, _batch(case.config))
        loss = runner.mean(runner.train(batch))
        gradients = export_huggingface(runner.model, gradients_of(runner), in_memory=True)
        return loss, gradients, runner.evaluate(batch), runner.predict(batch)


def outcomes_of_rank(rank: int, world: int, kind: str = "cpu") -> dict[str, Outcome]:
    """What each case gives on this rank, on the CPU or on its GPU."""
    device = CPU if kind == "cpu" else torch.device("cuda", rank)
    return {name: _outcome(case, device) for name, case in CASES[world].items()}


@cache
def _expected(config: ModelConfig) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    reference, batch = hugging_face_mixture(config), _batch(config)
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    weights = (batch["labels"] != -100).float() * batch["loss_mask"]
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, reference(batch["tokens"]).logits.detach()


def check_outcomes(world: int, of_ranks: Sequence[dict[str, Outcome]]) -> None:
    """Every rank has Hugging Face's loss, gradients and logits, in each case."""
    for name, case in CASES[world].items():
        expected_loss, expected, all_logits = _expected(case.config)
        for rank, outcome in enumerate(of_ranks):
            loss, gradients, _, logits = outcome[name]
            place = f"{name}, rank {rank}"
            assert abs(loss - expected_loss) <= 1e-6 * expected_loss, place
            assert gradients.keys() == expected.keys(), place
            errors = {n: relative_error(gradients[n], expected[n]) for n in expected}
            assert max(errors.values()) <= 1e-5, (place, errors)
            wanted = all_logits.split(len(logits))
            assert min(relative_error(logits, part) for part in wanted) <= 1e-5, place


@pytest.mark.parametrize("world", CASES)
def test_loss_gradients_and_logits_are_hugging_faces(world: int) -> None:
    check_outcomes(world, run_ranks(world, outcomes_of_rank, world))
