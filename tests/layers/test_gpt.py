"""A model with LayerNorm and GELU, lowered, against autograd through Megatron's own modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, ModelConfig, import_llama, parameter_count
from lightning_dhellam.parallel import ParallelContext
from tests.engine.harness import CPU, add_main_grads, batch_of, engine_of, pieces, train
from tests.models.llama import SMALL, relative_error

GPT = replace(SMALL, normalization="LayerNorm", activation="gelu", vocab_size=53)
TOLERANCE = 5e-6


def _model(config: ModelConfig) -> CausalLM:
    model = CausalLM(config, ParallelContext.single(CPU))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms away from one and zero, matrices that let attention attend.
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * 0.2 + (1 if "norm.weight" in name else 0))
    add_main_grads(model)
    return model


def _autograd(model: CausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    with model.context.megatron():
        losses = model(batch["tokens"], batch["labels"])
        loss = losses.sum() / (batch["labels"] != -100).sum()
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalization": "RMSNorm"},
        {"activation": "swiglu"},
        {"tie_embeddings": True},
        # Sequences of 17 tokens are long.
        {
            "rope_short_factors": (9.0,) * 4,
            "rope_long_factors": (1.0, 1.5, 2.0, 4.0),
            "rope_original_length": 16,
            "rope_magnitude": 1.25,
        },
    ],
    ids=str,
)
def test_against_autograd(change: dict[str, object]) -> None:
    config = replace(GPT, **change)  # type: ignore[arg-type]
    model = _model(config)
    batch = batch_of(config, 3, 17)
    loss, gradients = train(
        engine_of(lower(model), poison=True), model, pieces(batch, 1, model.context)
    )
    expected_loss, expected = _autograd(model, batch)
    assert abs(loss - expected_loss) <= TOLERANCE * expected_loss
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], value) for name, value in expected.items()}
    assert max(errors.values()) <= TOLERANCE, errors


def test_sequences_longer_than_the_first_ones_turn_otherwise() -> None:
    plain = replace(GPT, rope_magnitude=1.25)
    long = (1.0, 1.5, 2.0, 4.0)
    scaled = replace(
        plain, rope_short_factors=(1.0,) * 4, rope_long_factors=long, rope_original_length=8
    )
    rotary = _model(scaled).rotary
    assert rotary is not None
    ours = [rotary(length) for length in (8, 9)]
    model = _model(plain)
    with model.context.megatron():
        theirs = model.rotary(9)  # type: ignore[misc]
    torch.testing.assert_close(ours[0], theirs[:8])
    torch.testing.assert_close(ours[1], theirs / torch.tensor(long).repeat(2))


def test_slots_are_named_for_what_they_hold() -> None:
    layer = lower(_model(GPT)).layers[1]
    assert {"gelu", "gelu.grad"} <= {*layer.forward.by_name, *layer.backward.by_name}
    sizes = layer.forward.bytes_per_token
    assert sizes["up"] == sizes["act"] == 4 * GPT.ffn_hidden_size
    assert sizes["mlp_rstd"] == 2 * 4, "mean and reciprocal deviation"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"linear_bias": True},
        {"qkv_bias": True},
        {"linear_bias": True, "activation": "swiglu"},
        {"normalization": "RMSNorm", "num_query_groups": 4, "head_dim": 6},
    ],
    ids=str,
)
def test_parameters_are_counted(change: dict[str, object]) -> None:
    config = replace(GPT, vocab_size=64, **change)  # type: ignore[arg-type]
    model = _model(config)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)


def test_a_llama_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"normalization='LayerNorm', activation='gelu'.*swiglu"):
        import_llama(_model(GPT), {})
    other = replace(SMALL, linear_bias=True, qkv_bias=True, position_embedding="none")
    named = r"position_embedding='none', linear_bias=True, qkv_bias=True: Llama.*no biases"
    with pytest.raises(ValueError, match=named):
        import_llama(_model(other), {})


@pytest.mark.parametrize(
    ("field", "value"), [("normalization", "layernorm"), ("activation", "relu")]
)
def test_unknown_kinds_are_answered_with_the_known(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='{value}' is not known: use '"):
        replace(GPT, **{field: value})  # type: ignore[arg-type]


def test_a_gate_goes_with_silu() -> None:
    model = _model(GPT)
    model.transformer_config.gated_linear_unit = True
    with pytest.raises(ValueError, match="gated_linear_unit=True with activation_func=gelu"):
        lower(model)
