"""Linear layers in 8 bits: gradients near those of fp32, and the same bits whatever the plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.engine.state import StepState
from lightning_dhellam.kernels import fp8
from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.models import CausalLM, LoRA, add_lora
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.pipeline.schedules import SCHEDULES
from lightning_dhellam.pipeline.stage import Leg
from tests.engine.harness import CPU, add_main_grads, batch_of, differing, engine_of, pieces, train
from tests.models.llama import SMALL, relative_error
from tests.plan.graphs import random_builder

CONFIG = replace(
    SMALL, hidden_size=128, ffn_hidden_size=256, num_attention_heads=4, hidden_dropout=0.1
)
FORMATS = {"current": 0.13, "blockwise": 0.1}
"""Relative error of any gradient. An operand is off by 0.026 of it (E4M3) or 0.052 (E5M2), and
these errors, independent of each other, add up as squares over a dozen products."""


def _model(dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLM:
    model = CausalLM(replace(CONFIG, **changes), ParallelContext.single(CPU), dtype)
    add_main_grads(model)
    return model


def _lowered(model: CausalLM, name: str | None, **options: Any) -> Lowered:
    return lower(model, fp8=name, kernels={"fp8": "reference"}, **options)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("qkv_bias", [False, True], ids=["", "bias"])
def test_every_gradient_is_near_that_of_fp32(name: str, qkv_bias: bool) -> None:
    model = _model(qkv_bias=qkv_bias)
    micro_batches = pieces(batch_of(CONFIG, 3, 16), 2, model.context)
    loss, expected = train(engine_of(_lowered(model, None)), model, micro_batches)
    engine = engine_of(_lowered(model, name), poison=True)
    found, gradients = train(engine, model, micro_batches)
    errors = {n: relative_error(gradients[n], expected[n]) for n in expected}
    assert 0.02 < max(errors.values()) < FORMATS[name], errors
    assert relative_error(found, loss) < 1e-3 and found != loss
    assert torch.equal(engine.evaluate(micro_batches), engine.evaluate(micro_batches))
    assert engine.predict(micro_batches).isfinite().all()
    assert engine.lanes.ledger.slots == 0


@pytest.mark.parametrize("name", FORMATS)
def test_no_plan_and_nothing_made_again_changes_a_bit(name: str) -> None:
    model = _model(torch.bfloat16)
    micro_batches = pieces(batch_of(CONFIG, 3, 12), 1, model.context)
    expected = train(engine_of(_lowered(model, name)), model, micro_batches)
    for seed, choice in enumerate(("none", "gathers", "selective", "full", "selective", "full")):
        scheme = SCHEDULES["zb-v" if seed > 3 else "fold"]
        lowered = _lowered(model, name, recompute=choice, scheme=scheme)
        engine = engine_of(lowered, builder=random_builder(seed), poison=seed % 2 == 0)
        assert differing(train(engine, model, micro_batches), expected) == [], (choice, seed)


def test_weights_are_cast_once_a_step_and_all_else_once_for_its_readers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, counts = _model(), Counter[tuple[bool, torch.dtype]]()
    weights = {p.data_ptr() for p in model.parameters()}
    cast = fp8.reference.cast

    def counted(x: Any, dtype: torch.dtype, block: fp8.Block = None, largest: Any = None) -> Any:
        counts[x.data_ptr() in weights, dtype] += 1
        return cast(x, dtype, block, largest)

    monkeypatch.setattr(fp8.reference, "cast", counted)
    engine = engine_of(_lowered(model, "current"))
    engine.train(pieces(batch_of(CONFIG, 3, 16), 1, model.context))
    linear = 4 * CONFIG.num_layers
    assert counts == {
        (True, fp8.FORWARD): linear,
        (False, fp8.FORWARD): 3 * linear,
        (False, fp8.GRADIENT): 3 * linear,
    }


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_saved_bytes_are_those_predicted(name: str, recompute: str) -> None:
    model = _model(torch.bfloat16, hidden_dropout=0.0)
    lowered = _lowered(model, name, recompute=recompute)
    engine = engine_of(lowered)
    # As many tokens as blocks take, so that nothing is padded.
    (piece,) = pieces(batch_of(CONFIG, 4, 32), 4, model.context)
    live: list[int] = []
    whole = engine._walker._pass

    def watched(leg: Leg, state: StepState, on_gradient: Any) -> None:
        whole(leg, state, on_gradient)
        live.append(engine.lanes.ledger.bytes)

    engine._walker._pass = watched  # type: ignore[method-assign]
    engine.train([piece])
    saved, weights = live
    predicted = sum(pair.saved_bytes(piece.tokens) for pair in lowered.layers)
    cast = sum(
        2 * p.numel() for n, p in model.layers.named_parameters() if p.dim() == 2 and "linear" in n
    )
    assert cast <= weights < 1.01 * cast
    # Of a tensor's own scale, 4 bytes, the prediction knows nothing.
    assert 0 <= saved - weights - predicted <= 4 * 4 * CONFIG.num_layers
    plain = sum(pair.saved_bytes(piece.tokens) for pair in lower(model, recompute="none").layers)
    assert predicted < plain


def test_adapters_train_beside_frozen_weights_in_8_bits() -> None:
    model = _model()
    add_lora(model, LoRA(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.up"):
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    add_main_grads(model)
    micro_batches = pieces(batch_of(CONFIG, 3, 16), 2, model.context)
    _, expected = train(engine_of(_lowered(model, None)), model, micro_batches)
    lowered = _lowered(model, "current")
    assert not any("turned" in slot for pair in lowered.layers for slot in pair.saved)
    _, found = train(engine_of(lowered, poison=True), model, micro_batches)
    errors = {n: relative_error(found[n], expected[n]) for n in expected}
    assert len(errors) == 8 * CONFIG.num_layers and max(errors.values()) < 0.3, errors


def test_what_is_captured_of_an_operator_runs_it_again() -> None:
    """As a profile does."""
    model = _model()
    lowered = _lowered(model, "current")
    engine = engine_of(lowered)
    found = engine.capture(pieces(batch_of(CONFIG, 2, 16), 2, model.context)[0])
    for pair in lowered.layers[1:2]:
        for graph in (pair.forward, pair.backward):
            for operator in graph.operators:
                values = found[graph.fingerprint, operator.name]
                assert len(values) == len(operator.reads)
                with torch.no_grad():
                    operator.run(*values)


def test_what_cannot_be_computed_in_8_bits_is_refused() -> None:
    narrow = _model(hidden_size=96, num_attention_heads=4, num_query_groups=4)
    for name, changed, kernels, message in (
        ("curent", _model(), {}, "fp8='curent' must be one of current, blockwise, or None"),
        ("current", _model(), {}, "the device is cpu: leave fp8 out, or let it be emulated"),
        ("current", _model(torch.float16), {"fp8": "reference"}, "fp16 activations: use 'bf16-"),
        ("blockwise", narrow, {"fp8": "reference"}, "multiples of 128, and qkv of layer 0 has 288"),
    ):
        with pytest.raises(ValueError) as error:
            lower(changed, fp8=name, kernels=kernels)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"fp8_all_gather=True .*fp8=None has none: give fp8 as"):
        lower(_model(), fp8_all_gather=True)


def test_casts_that_run_once_a_step_are_named_in_traces() -> None:
    model = _model(torch.bfloat16)
    engine = engine_of(_lowered(model, "current"))
    micro_batches = pieces(batch_of(CONFIG, 3, 16), 1, model.context)
    with engine.traced(CPU) as tracer, torch.profiler.profile() as profiler:
        train(engine, model, micro_batches)
    casts = Counter(o.name for pair in engine.layers for o in pair.forward.preparation)
    assert len(casts) == 4 and set(casts.values()) == {CONFIG.num_layers}
    spans = [span for span in tracer.spans() if span.operator.name in casts]
    assert Counter(span.operator.name for span in spans) == casts, "once a step in each layer"
    places = [list(pair.forward.preparation) for pair in engine.layers]
    assert all(span.operator.name in {o.name for o in places[span.layer]} for span in spans)
    shown = Counter(event.name for event in profiler.events() or () if "step/" in event.name)
    assert shown == {f"step/{name}": count for name, count in casts.items()}
