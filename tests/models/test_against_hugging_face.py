"""Loss and every gradient of the stock forward against transformers' Llama, fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from lightning_dhellam.models import CausalLM, ModelConfig, export_llama, import_llama
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import (
    SMALL,
    hugging_face_llama,
    random_batch,
    relative_error,
    token_losses,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
CASES = {
    "grouped-queries": SMALL,
    "one-group-per-head": replace(SMALL, num_query_groups=4),
    "tied": replace(SMALL, tie_embeddings=True),
    "odd-vocabulary": replace(SMALL, vocab_size=53),
    # With TP 2 the second rank of this one holds nothing but padding.
    "tiny-vocabulary-tied": replace(SMALL, vocab_size=7, tie_embeddings=True),
    "scaled-rope-wide-heads": replace(SMALL, head_dim=16, rope_scaling_factor=8.0),
}
Outcome = tuple[Tensor, Tensor, dict[str, Tensor]]


def _outcome(config: ModelConfig, context: ParallelContext) -> Outcome:
    """Logits, losses and gradients by Hugging Face names, on whole tensors."""
    model = CausalLM(config, context)
    import_llama(model, hugging_face_llama(config))
    tokens, labels = (tensor.to(context.device) for tensor in random_batch(config))
    with torch.no_grad():
        logits = model(tokens)
    if not dist.is_initialized():
        losses = model(tokens, labels)
        losses.mean().backward()
        attribute = "grad"
    else:
        with context.megatron():
            ddp = DistributedDataParallel(
                model.transformer_config,
                DistributedDataParallelConfig(grad_reduce_in_fp32=True),
                model,
                pg_collection=context.groups,
            )
            losses = ddp(tokens, labels)
            losses.mean().backward()
            finalize_model_grads([ddp], pg_collection=context.groups)
        attribute = "main_grad"
    gradients = {name: getattr(weight, attribute) for name, weight in model.named_parameters()}
    exported = {name: tensor.cpu() for name, tensor in export_llama(model, gradients).items()}
    return logits.cpu(), losses.detach().cpu(), exported


def _outcomes_of_tensor_parallel_rank(rank: int) -> dict[str, Outcome]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    return {name: _outcome(config, context) for name, config in CASES.items()}


@pytest.fixture(scope="module")
def tensor_parallel_outcomes() -> list[dict[str, Outcome]]:
    return run_ranks(2, _outcomes_of_tensor_parallel_rank)


def _check(config: ModelConfig, outcome: Outcome) -> None:
    logits, losses, gradients = outcome
    reference = hugging_face_llama(config)
    tokens, labels = random_batch(config)
    expected = token_losses(reference, tokens, labels)
    expected.mean().backward()
    assert logits.shape == (*tokens.shape, config.vocab_size)
    assert relative_error(logits, reference(tokens).logits.detach()) <= 1e-5
    assert losses.dtype == torch.float32 and losses.shape == labels.shape
    assert torch.all(losses[labels == -100] == 0.0)
    assert relative_error(losses, expected.detach()) <= 1e-6
    wanted = {
        name: weight.grad
        for name, weight in reference.named_parameters()
        if weight.grad is not None
    }
    assert gradients.keys() == wanted.keys()
    errors = {name: relative_error(gradients[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("name", CASES)
def test_one_rank_without_torch_distributed(name: str) -> None:
    _check(CASES[name], _outcome(CASES[name], ParallelContext.single(CPU)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_one_gpu(name: str) -> None:
    _check(CASES[name], _outcome(CASES[name], ParallelContext.single(torch.device("cuda", 0))))


@pytest.mark.parametrize("name", CASES)
def test_two_tensor_ranks_with_sequence_parallelism(
    name: str, tensor_parallel_outcomes: list[dict[str, Outcome]]
) -> None:
    for outcomes in tensor_parallel_outcomes:
        _check(CASES[name], outcomes[name])


def test_rope_scaling_is_not_a_no_op() -> None:
    config = CASES["scaled-rope-wide-heads"]
    tokens, labels = random_batch(config)
    state = hugging_face_llama(config).state_dict()
    losses = []
    for factor in (8.0, None):
        model = CausalLM(replace(config, rope_scaling_factor=factor), ParallelContext.single(CPU))
        import_llama(model, state)
        losses.append(model(tokens, labels).detach())
    assert relative_error(losses[0], losses[1]) > 1e-3
