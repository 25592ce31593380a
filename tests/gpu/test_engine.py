"""The engine on one GPU: against Hugging Face, plan invariance, memory, host synchronisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lightning_dhellam.engine import Engine
from lightning_dhellam.engine.state import StepState
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, ModelConfig, export_llama, import_llama
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.pipeline.schedules import SCHEDULES, Placement
from lightning_dhellam.pipeline.schedules.named import Written
from lightning_dhellam.pipeline.stage import Leg
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import add_main_grads, batch_of, differing, engine_of, pieces, train
from tests.models.llama import hugging_face_llama, relative_error, token_losses
from tests.pipeline.random_schedules import random_schedule
from tests.plan.graphs import random_builder

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    num_layers=3,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=501,
    max_sequence_length=128,
)
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RANDOM_PLANS = 100


def _model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[CausalLM, LlamaForCausalLM]:
    """Ours, and Hugging Face's with the same weights in fp32."""
    reference = hugging_face_llama(config).to(device)
    model = CausalLM(config, ParallelContext.single(device), dtype)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 2:
                # Matrices that keep the size of activations, where bf16 is at its best.
                parameter.mul_(0.3)
            parameter.copy_(parameter.to(dtype))
    import_llama(model, reference)
    add_main_grads(model)
    return model, reference


def _batch(config: ModelConfig, device: torch.device, samples: int = 5) -> dict[str, Tensor]:
    batch = batch_of(config, samples, 96)
    return {name: value.to(device) for name, value in batch.items()}


def _expected(
    reference: LlamaForCausalLM, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    reference.zero_grad()
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    loss = losses.sum() / (batch["labels"] != -100).sum()
    loss.backward()
    named = reference.named_parameters()
    gradients = {n: p.grad.float().cpu() for n, p in named if p.grad is not None}
    return loss.detach(), gradients


def _outcome(
    model: CausalLM, batch: dict[str, Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    engine = engine_of(lower(model), model.context.device, poison=True, **options)
    loss, gradients = train(engine, model, pieces(batch, 2, model.context))
    return loss, export_llama(model, gradients)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_against_hugging_face_in_fp32(tied: bool, device: torch.device) -> None:
    config = replace(CONFIG, tie_embeddings=tied)
    model, reference = _model(config, device, torch.float32)
    batch = _batch(config, device)
    loss, gradients = _outcome(model, batch)
    expected_loss, expected = _expected(reference, batch)
    assert abs(loss - expected_loss) <= 2e-6 * expected_loss
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 5e-5, errors


def test_against_hugging_face_in_bf16(device: torch.device) -> None:
    model, reference = _model(CONFIG, device, torch.bfloat16)
    batch = _batch(CONFIG, device)
    loss, gradients = _outcome(model, batch)
    # The same bf16 weights, computed in fp32, are the truth for both.
    expected_loss, expected = _expected(reference, batch)
    their_loss, theirs = _expected(reference.to(torch.bfloat16), batch)
    assert abs(loss - expected_loss) <= max(1e-3 * expected_loss, 2 * abs(their_loss - loss))
    assert abs(loss - expected_loss) <= 1e-2 * expected_loss
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        cosine = torch.cosine_similarity(gradients[name].flatten(), value.flatten(), dim=0)
        assert cosine >= 0.99, name
        ours, other = (relative_error(g[name], value) for g in (gradients, theirs))
        assert ours <= max(1.5 * other, 1e-2), name


@TYPES
def test_no_plan_changes_a_bit(dtype: torch.dtype, device: torch.device) -> None:
    config = replace(CONFIG, hidden_dropout=0.1, tie_embeddings=True)
    model, _ = _model(config, device, dtype)
    lowered = lower(model)
    micro_batches = pieces(_batch(config, device), 2, model.context)
    plain = engine_of(lowered, device, builder=BUILDERS["sequential"])
    poisoned = engine_of(lowered, device, poison=True)
    expected = train(plain, model, micro_batches)
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in expected[1].values())
    builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(RANDOM_PLANS)}
    for index, (name, builder) in enumerate(builders.items()):
        engine = poisoned if index % 2 else plain
        engine.install(builder)
        assert differing(train(engine, model, micro_batches), expected) == [], name


def schedules_that_differ(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Schedules whose losses or gradients on one stage are other ones than the fold's."""
    config = replace(CONFIG, hidden_dropout=0.1)
    model, _ = _model(config, device, dtype)
    micro_batches = pieces(_batch(config, device), 1, model.context)
    expected = train(engine_of(lower(model), device), model, micro_batches)
    schemes = {name: SCHEDULES[name] for name in ("zb-v", "dualpipe-v")}
    for seed in range(6):
        schedule = random_schedule(seed, Placement.folded(1), len(micro_batches))
        schemes[str(schedule)] = Written(schedule, "random")
    wrong = []
    for index, (name, scheme) in enumerate(schemes.items()):
        lowered = lower(model, scheme=scheme, recompute="selective" if index % 2 else "gathers")
        engine = engine_of(lowered, device, builder=random_builder(index), poison=index % 3 == 0)
        if differing(train(engine, model, micro_batches), expected):
            wrong.append(name)
    return wrong


@TYPES
def test_no_schedule_changes_a_bit(dtype: torch.dtype, device: torch.device) -> None:
    assert schedules_that_differ(device, dtype) == []


@TYPES
def test_predicted_saved_bytes_are_those_measured(dtype: torch.dtype, device: torch.device) -> None:
    model, _ = _model(CONFIG, device, dtype)
    lowered = lower(model)
    engine = engine_of(lowered, device)
    (piece,) = pieces(_batch(CONFIG, device), 5, model.context)
    live: list[int] = []
    whole_pass = engine._walker._pass

    def watched(leg: Leg, state: StepState, on_gradient: Any) -> None:
        whole_pass(leg, state, on_gradient)
        live.append(engine.lanes.ledger.bytes)

    engine._walker._pass = watched  # type: ignore[method-assign]
    engine.train([piece])
    assert live == [sum(pair.saved_bytes(piece.tokens) for pair in lowered.layers), 0]


def test_memory_is_what_it_was_before_the_step(device: torch.device) -> None:
    model, _ = _model(CONFIG, device, torch.bfloat16)
    engine = engine_of(lower(model), device)
    micro_batches = pieces(_batch(CONFIG, device), 1, model.context)
    engine.train(micro_batches)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = engine.train(micro_batches)
    torch.cuda.synchronize()
    del loss
    assert torch.cuda.memory_allocated() == before


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_for_synchronisation_works(device: torch.device) -> None:
    with _no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=device).item()


@TYPES
@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_never_waits_for_the_device(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    config = replace(CONFIG, hidden_dropout=0.1)
    model, _ = _model(config, device, dtype)
    engine: Engine = engine_of(lower(model), device, builder=BUILDERS[name])
    batches = [
        {key: value.pin_memory() for key, value in batch_of(config, 3, 96).items()}
        for _ in range(3)
    ]
    losses = [engine.train(pieces(batches[0], 1, model.context))]
    torch.cuda.synchronize()
    with _no_synchronisation():
        for step in (1, 2):
            losses.append(engine.train(pieces(batches[step], 1, model.context, step)))
    assert torch.isfinite(torch.stack(losses)).all()
