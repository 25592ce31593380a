"""Several real GPUs with NCCL compute what one process does, whatever the layout and the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dhellam.autosearch.transfers import take_transfers
from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, export_llama, import_llama
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.search.measure import Transfer
from tests.engine.harness import (
    add_main_grads,
    batch_of,
    differing,
    engine_of,
    pieces,
    prepared,
    reduced,
    train,
)
from tests.layers.test_users_blocks import (
    Convolution,
    Perceptron,
    TokenWisePerceptron,
    split_along,
)
from tests.models.llama import SMALL, hugging_face_llama, relative_error, token_losses
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks
from tests.strategy.lost_rank import TORCHRUN, lose
from tests.strategy.runs import Model, join
from tests.strategy.runs import train as train_under_lightning
from tests.strategy.test_after_fit import used_again

pytestmark = pytest.mark.gpu

COUNT = torch.cuda.device_count()
LENGTH = 64
# Heads of 16, which every attention kernel takes.
CONFIG = replace(
    SMALL,
    num_layers=5,
    hidden_size=256,
    ffn_hidden_size=384,
    num_attention_heads=16,
    num_query_groups=8,
    vocab_size=501,
    hidden_dropout=0.0,
)
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {"tp2": {"tensor_parallel_size": 2}, "pp2": {"pipeline_parallel_size": 2}},
    4: {
        "tp4": {"tensor_parallel_size": 4},
        "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    },
    8: {
        "tp8": {"tensor_parallel_size": 8},
        "tp4-pp2": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
        "tp2-pp4": {"tensor_parallel_size": 2, "pipeline_parallel_size": 4},
    },
}
CASES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]
RANDOM_PLANS = 20


def needs(world: int) -> None:
    if world > COUNT:
        pytest.skip(f"needs {world} GPUs, there are {COUNT}")


def _reproducible() -> None:
    prepare()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)


def _context(rank: int, sizes: dict[str, int]) -> ParallelContext:
    return ParallelContext.create(torch.device("cuda", rank), **sizes)


def _batch(samples: int, device: torch.device) -> dict[str, Tensor]:
    return {name: rows.to(device) for name, rows in batch_of(CONFIG, samples, LENGTH).items()}


def _calm(model: torch.nn.Module) -> None:
    """Let matrices keep the size of activations, so that rounding is not blown up by layers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.2)


def _gradients(rank: int, sizes: dict[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    _reproducible()
    context = _context(rank, sizes)
    model = prepared(CONFIG, context).to(context.device)
    _calm(model)
    engine = engine_of(lower(model), context.device, poison=True)
    loss, gradients = train(engine, model, pieces(_batch(5, context.device), 2, context))
    exported = export_llama(model, reduced(model, gradients))
    return loss.cpu(), {name: gradient.cpu() for name, gradient in exported.items()}


@pytest.fixture(scope="module")
def one_gpu() -> tuple[Tensor, dict[str, Tensor]]:
    (outcome,) = run_ranks(1, _gradients, {}, backend="nccl")
    loss, gradients = outcome
    return loss, gradients


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_losses_and_gradients_are_those_of_one_gpu(
    world: int, layout: str, one_gpu: tuple[Tensor, dict[str, Tensor]]
) -> None:
    needs(world)
    expected, reference = one_gpu
    sizes = LAYOUTS[world][layout]
    outcomes = run_ranks(world, _gradients, sizes, backend="nccl")
    first_stage = world // sizes.get("pipeline_parallel_size", 1)
    for rank, (loss, gradients) in enumerate(outcomes):
        assert abs(loss - expected * (rank < first_stage)) <= 2e-6 * expected
        errors = {name: relative_error(gradients[name], value) for name, value in reference.items()}
        assert errors.keys() == gradients.keys()
        assert max(errors.values()) <= 1e-5, errors


def _same_weights(block: nn.Module, context: ParallelContext) -> None:
    """Those of one process: on a GPU, what Megatron draws depends on how tensors are split."""
    generator = torch.Generator().manual_seed(2)
    topology = context.topology
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            axis, shape = split_along(name), list(parameter.shape)
            if axis is not None:
                shape[axis] *= topology.tp_size
            drawn = torch.randn(shape, generator=generator) * 0.1
            if axis is not None:
                drawn = drawn.chunk(topology.tp_size, axis)[topology.tp_rank]
            parameter.copy_(drawn)


def _of_users_blocks(rank: int, sizes: dict[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients with blocks of whole sequences, one with Megatron's parallel layers."""
    _reproducible()
    context = _context(rank, sizes)
    model = prepared(CONFIG, context).to(context.device)
    _calm(model)
    config, group = model.transformer_config, context.groups.tp
    blocks = (Convolution(0.2, CONFIG.hidden_size), Perceptron(config, group))
    for index, block in enumerate((*blocks, TokenWisePerceptron(config, group))):
        _same_weights(block, context)
        model.layers.insert(1 + index, block.to(context.device))
    add_main_grads(model)
    engine = engine_of(lower(model), context.device, poison=True)
    loss, gradients = train(engine, model, pieces(_batch(5, context.device), 2, context))
    gradients = reduced(model, gradients)
    own = ("layers.1.", "layers.2.", "layers.3.")
    return loss.cpu(), {n: g.cpu() for n, g in gradients.items() if n.startswith(own)}


def test_users_blocks_on_two_gpus_are_as_on_one() -> None:
    needs(2)
    ((expected, reference),) = run_ranks(1, _of_users_blocks, {}, backend="nccl")
    sizes = {"tensor_parallel_size": 2}
    (loss, first), (other, second) = run_ranks(2, _of_users_blocks, sizes, backend="nccl")
    assert torch.equal(loss, other) and abs(loss - expected) <= 2e-6 * expected
    for name, value in reference.items():
        axis = split_along(name)
        found = first[name] if axis is None else torch.cat([first[name], second[name]], axis)
        assert axis is not None or torch.equal(first[name], second[name]), name
        assert relative_error(found, value) <= 1e-5, name


def test_one_gpu_computes_what_hugging_face_does(
    one_gpu: tuple[Tensor, dict[str, Tensor]],
) -> None:
    loss, gradients = one_gpu
    reference, batch = hugging_face_llama(CONFIG), batch_of(CONFIG, 5, LENGTH)
    _calm(reference)
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    expected = losses.sum() / (batch["labels"] != -100).sum()
    expected.backward()
    assert abs(loss - expected) <= 1e-5 * expected
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            assert relative_error(gradients[name], parameter.grad) <= 1e-4, name


def _plans_that_differ(rank: int, sizes: dict[str, int]) -> dict[str, list[str]]:
    _reproducible()
    context = _context(rank, sizes)
    config = replace(CONFIG, hidden_dropout=0.1)
    model = prepared(config, context, torch.bfloat16).to(context.device)
    lowered = lower(model)
    micro_batches = pieces(_batch(5, context.device), 1, context)
    engine = engine_of(lowered, context.device, BUILDERS["sequential"])
    poisoned = engine_of(lowered, context.device, poison=True)
    expected = train(engine, model, micro_batches)
    wrong = {}
    builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(RANDOM_PLANS)}
    for index, (name, builder) in enumerate(builders.items()):
        other = poisoned if index % 2 else engine
        other.install(builder)
        wrong[name] = differing(train(other, model, micro_batches), expected)
    return {name: tensors for name, tensors in wrong.items() if tensors}


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_no_plan_changes_a_bit(world: int, layout: str) -> None:
    needs(world)
    outcomes = run_ranks(world, _plans_that_differ, LAYOUTS[world][layout], backend="nccl")
    assert outcomes == [{}] * world


HEADS: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
"""Of 16, which every attention kernel takes."""
Strategies = dict[str, dict[str, Any]]
STRATEGIES: dict[int, Strategies] = {
    2: {
        "tp2": {"tensor_parallel_size": 2, "micro_batch_size": 3},
        "pp2": {"pipeline_parallel_size": 2, "micro_batch_size": 3},
        "pp2-zb-v": {"pipeline_parallel_size": 2, "micro_batch_size": 1, "schedule": "zb-v"},
        "pp2-1f1b": {"pipeline_parallel_size": 2, "schedule": "1f1b"},
        "dp2": {"micro_batch_size": 2, "bucket_size": 300},
        "dp2-unsharded": {"micro_batch_size": 2, "distributed_optimizer": False},
    },
    4: {
        "tp2-dp2": {"tensor_parallel_size": 2, "micro_batch_size": 2},
        "pp2-dp2": {"pipeline_parallel_size": 2, "schedule": "dualpipe-v"},
        "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    },
    8: {
        "tp2-pp2-dp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        "dp8": {"micro_batch_size": 1},
    },
}


class SameStart(Model):
    """With Hugging Face's weights: on a GPU, what is drawn depends on how tensors are split."""

    def build_model(self, context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        model = super().build_model(context, dtype)
        import_llama(model, hugging_face_llama(self.model_config))
        return model


def _trained(rank: int, world: int, strategies: Strategies) -> dict[str, list[float]]:
    _reproducible()
    join(rank, world)
    options = {"accelerator": "gpu", "gradient_clip_val": 0.1}
    return {
        name: train_under_lightning(strategy, SameStart(**HEADS), **options)
        for name, strategy in strategies.items()
    }


@pytest.mark.parametrize("world", STRATEGIES)
def test_training_under_lightning_goes_as_on_one_gpu(world: int) -> None:
    needs(world)
    (alone,) = run_ranks(1, _trained, 1, {"one": {"micro_batch_size": 2}}, backend="nccl")
    outcomes = run_ranks(world, _trained, world, STRATEGIES[world], backend="nccl")
    assert len(set(alone["one"])) == 4
    for losses in outcomes:
        for name, found in losses.items():
            errors = [abs(a / b - 1) for a, b in zip(found, alone["one"], strict=True)]
            assert all(error <= 2e-5 for error in errors), (name, errors)


def _searched(rank: int) -> dict[str, list[float]]:
    _reproducible()
    join(rank, 2)
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "max_steps": 60, "samples": 480}
    strategy = {"tensor_parallel_size": 2, "micro_batch_size": 3}
    return {
        plan: train_under_lightning({**strategy, "plan": plan}, Model(**HEADS), **options)
        for plan in ("sequential", "auto")
    }


def test_a_search_changes_no_loss() -> None:
    needs(2)
    for losses in run_ranks(2, _searched, backend="nccl", timeout=240):
        assert len(losses["auto"]) == 60
        assert losses["auto"] == losses["sequential"]


def _scheduled(rank: int) -> dict[str, list[float]]:
    _reproducible()
    join(rank, 2)
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "max_steps": 40, "samples": 320}
    strategy = {"pipeline_parallel_size": 2, "micro_batch_size": 1}
    return {
        name: train_under_lightning({**strategy, "schedule": name}, Model(**HEADS), **options)
        for name in ("fold", "auto")
    }


def test_a_search_of_schedules_changes_no_loss() -> None:
    needs(2)
    for losses in run_ranks(2, _scheduled, backend="nccl", timeout=240):
        assert len(losses["auto"]) == 40
        assert losses["auto"] == losses["fold"]


def _transfers(rank: int) -> list[Transfer]:
    context = _context(rank, {"pipeline_parallel_size": 2})
    model = prepared(CONFIG, context).to(context.device)
    return list(take_transfers(engine_of(lower(model), context.device), context, 1 << 16))


def test_transfers_between_two_gpus_are_timed_beside_compute() -> None:
    needs(2)
    for stage, rows in enumerate(run_ranks(2, _transfers, backend="nccl")):
        assert {(row.source, row.target) for row in rows} == {(stage, 1 - stage)}
        for row in rows:
            assert 0 < row.seconds < 1 and 0 < row.beside < 1 and 0 <= row.takes < 1, row
            assert 0 <= row.waits < 1 if row.spins else row.waits is None, row


def _used_again(rank: int, sizes: dict[str, int]) -> None:
    _reproducible()
    used_again(rank, sizes, HEADS, "gpu")


@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_runs_of_the_same_sizes_use_the_same_communicators(size: str) -> None:
    needs(2)
    run_ranks(2, _used_again, {size: 2}, backend="nccl")


def _own_plan(rank: int) -> str:
    join(rank, 2)
    plan = ("sequential", "megatron")[rank]
    with pytest.raises(ValueError) as error:
        train_under_lightning({"tensor_parallel_size": 2, "plan": plan}, accelerator="gpu")
    return str(error.value)


def test_ranks_with_different_orders_of_collectives_are_refused() -> None:
    needs(2)
    for message in run_ranks(2, _own_plan, backend="nccl"):
        assert "orders the operators differently on different ranks" in message


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["lightning", "torchrun"])
def test_a_job_ends_when_a_rank_is_killed_in_a_step(
    launcher: tuple[str, ...], victim: int, tmp_path: Path
) -> None:
    needs(2)
    output, code = lose(victim, tmp_path, "gpu", *launcher)
    assert f"rank {victim} is killed" in output
    assert code != 0
    if launcher:
        assert "Signal 9 (SIGKILL)" in output, output
    elif victim:
        assert "terminated with code -9" in output, output
    else:
        # The other one notices itself, or its collective runs into the time-out.
        signs = ("so does this one", "Watchdog caught collective operation timeout")
        assert any(sign in output for sign in signs), output
