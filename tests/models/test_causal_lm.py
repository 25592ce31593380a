"""Construction, initial weights and input checks of CausalLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import CausalLM, export_llama, parameter_count
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import SMALL, random_batch
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ODD = replace(SMALL, vocab_size=53)


@pytest.fixture
def context() -> ParallelContext:
    return ParallelContext.single(CPU)


def _initial_weights_of_tensor_rank(rank: int) -> tuple[dict[str, Tensor], str]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    model = CausalLM(ODD, context, seed=7)
    with pytest.raises(ValueError) as error:
        model(torch.zeros(1, 15, dtype=torch.long))
    return export_llama(model), str(error.value)


def test_initial_weights_do_not_depend_on_the_tensor_parallel_size(
    context: ParallelContext,
) -> None:
    alone = export_llama(CausalLM(ODD, context, seed=7))
    for weights, error in run_ranks(2, _initial_weights_of_tensor_rank):
        assert weights.keys() == alone.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, alone[name]), name
        assert "sequence length 15" in error and "tensor_parallel_size=2" in error


def test_initial_weights_follow_the_seed_and_spare_the_callers_generator(
    context: ParallelContext,
) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        dict(CausalLM(SMALL, context, seed=seed).named_parameters()) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert changed == [name for name in first if first[name].dim() == 2]
    # Megatron scales the last matrix of each residual branch down by sqrt(2 * layers) = 2.
    assert first["layers.0.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["layers.0.mlp.linear_fc2.weight"].std().item() == pytest.approx(0.01, rel=0.1)


def test_names_that_lowering_relies_on(context: ParallelContext) -> None:
    model = CausalLM(ODD, context, torch.bfloat16)
    assert model.padded_vocab_size == 56
    assert model.output_weight is model.output_layer.weight
    assert model.output_weight.shape == (56, 32) and model.output_weight.dtype == torch.bfloat16
    assert len(model.layers) == 2 and model.layers[1].layer_number == 2
    assert not vars(model.final_norm.weight)["sequence_parallel"]
    tied = CausalLM(replace(ODD, tie_embeddings=True), context)
    assert tied.output_weight is tied.embedding.word_embeddings.weight
    assert tied.output_layer.weight is None


def test_parameter_count_is_that_of_the_model_without_padding(context: ParallelContext) -> None:
    for config in (ODD, replace(ODD, tie_embeddings=True, head_dim=6)):
        exported = export_llama(CausalLM(config, context))
        assert sum(tensor.numel() for tensor in exported.values()) == parameter_count(config)


def test_loss_mask_multiplies_and_dropout_acts_in_training_only(context: ParallelContext) -> None:
    model = CausalLM(replace(SMALL, hidden_dropout=0.5), context)
    tokens, labels = random_batch(SMALL)
    mask = torch.zeros(tokens.shape)
    mask[2, 4] = 2.0
    assert not torch.equal(model(tokens, labels), model(tokens, labels))
    model.eval()
    losses = model(tokens, labels)
    assert torch.equal(losses, model(tokens, labels))
    assert torch.equal(model(tokens, labels, mask), losses * mask)


def _losses_with_dropout(rank: int) -> tuple[Tensor, Tensor]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    model = CausalLM(replace(SMALL, hidden_dropout=0.5), context)
    with context.megatron(), model._dropout_generator():
        mask = torch.nn.functional.dropout(torch.ones(64), 0.5)
    tokens, labels = random_batch(SMALL)
    return mask, model(tokens, labels).detach()


def test_tensor_ranks_drop_different_tokens_and_agree_on_the_loss() -> None:
    (first_mask, first), (second_mask, second) = run_ranks(2, _losses_with_dropout)
    assert not torch.equal(first_mask, second_mask)
    assert torch.equal(first, second)


def test_bfloat16_losses_are_fp32_and_close(context: ParallelContext) -> None:
    tokens, labels = random_batch(SMALL)
    exact = CausalLM(SMALL, context)(tokens, labels)
    rounded = CausalLM(SMALL, context, torch.bfloat16)(tokens, labels)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=5e-3)


def test_too_long_sequences_are_refused(context: ParallelContext) -> None:
    with pytest.raises(ValueError, match="65 tokens exceed max_sequence_length=64"):
        CausalLM(SMALL, context)(torch.zeros(1, 65, dtype=torch.long))
