"""Models with experts, as they are built of Megatron-core's modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from lightning_dhellam.models import CausalLM, ModelConfig, parameter_count
from lightning_dhellam.models.router import SparseMixer
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import SMALL
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MOE = replace(SMALL, num_experts=5, experts_per_token=2, expert_ffn_hidden_size=24)
CASES = {
    "all layers": MOE,
    "dense first, a shared expert": replace(
        MOE, moe_layer_freq=(0, 1), shared_expert_ffn_hidden_size=40
    ),
    "two-step routing, biases": replace(
        MOE,
        router_scores="sparsemixer",
        normalization="LayerNorm",
        attention_bias=True,
    ),
    "a norm of heads": replace(MOE, qk_norm=True, head_dim=10, tie_embeddings=True),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_layers_are_of_stock_modules_and_counted(config: ModelConfig) -> None:
    model = CausalLM(config, ParallelContext.single(CPU))
    assert [type(layer.mlp) for layer in model.layers] == [
        MoELayer if here else MLP for here in config.expert_layers
    ]
    mixture = model.layers[1].mlp
    assert type(mixture.experts) is SequentialMLP
    mixer = config.router_scores == "sparsemixer"
    assert type(mixture.router) is (SparseMixer if mixer else TopKRouter)
    shared = config.shared_expert_ffn_hidden_size is not None
    assert type(mixture.shared_experts) is (SharedExpertMLP if shared else type(None))
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    biases = [name for name, _ in model.layers.named_parameters() if "linear_" in name]
    with_bias = [name for name in biases if name.endswith("bias")]
    assert len(with_bias) == (4 if config.attention_bias else 0)
    assert not any("experts" in name for name in with_bias)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_models_with_experts_run_by_plain_autograd(config: ModelConfig) -> None:
    model = CausalLM(config, ParallelContext.single(CPU))
    tokens = torch.randint(config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with model.context.megatron():
        losses = model(tokens, tokens)
        losses.mean().backward()
    assert losses.shape == (2, 12) and losses.isfinite().all()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


SHARED = replace(CASES["dense first, a shared expert"], num_experts=4)


def _drawn(context: ParallelContext) -> dict[str, torch.Tensor]:
    """Every weight of a new model, experts by their numbers in the layer."""
    model = CausalLM(SHARED, context, seed=7)
    own = len(model.layers[1].mlp.local_expert_indices)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        before, local, after = name.partition("local_experts.")
        if local:
            number, rest = after.split(".", 1)
            name = f"{before}{int(number) + own * context.topology.ep_rank}.{rest}"
        found[name] = parameter.detach()
    return found


def _drawn_on(rank: int, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    return _drawn(ParallelContext.create(CPU, **sizes))


def test_new_experts_do_not_depend_on_the_expert_parallel_size() -> None:
    alone = _drawn(ParallelContext.single(CPU))
    different = {w.sum().item() for name, w in alone.items() if "linear_fc1" in name}
    assert len(different) == 1 + SHARED.num_experts + 1, "every expert draws its own"
    found: set[str] = set()
    for weights in run_ranks(2, _drawn_on, {"expert_parallel_size": 2}):
        assert [name for name in weights if not torch.equal(weights[name], alone[name])] == []
        found |= weights.keys()
    assert found == alone.keys()
