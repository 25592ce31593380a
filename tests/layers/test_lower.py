"""Options of lowering, custom losses, generic modules, and what is refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dhellam.kernels import cross_entropy
from lightning_dhellam.kernels.candidate import Candidate
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.layers import attention, linear, lower, mlp, norm, residual, transformer
from lightning_dhellam.models import CausalLM, ModelConfig, export_llama
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.passes import CHOICES
from tests.engine.harness import (
    CPU,
    add_main_grads,
    batch_of,
    differing,
    engine_of,
    pieces,
    prepared,
    reduced,
    train,
)
from tests.models.llama import SMALL, relative_error
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

CONFIG = replace(SMALL, vocab_size=53)
Outcome = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture
def context() -> ParallelContext:
    return ParallelContext.single(CPU)


def mean_cross_entropy(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """A user's own loss, on whole logits [B, S, V]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _with_built_in_and_custom_loss(context: ParallelContext) -> tuple[Outcome, Outcome]:
    model = prepared(CONFIG, context)
    batch = batch_of(CONFIG, 5, 16)
    # A mean over samples is the mean over tokens only where every token counts.
    batch["labels"].clamp_(min=0)
    outcomes = []
    for loss in (None, mean_cross_entropy):
        engine = engine_of(lower(model, loss=loss), poison=True)
        value, gradients = train(engine, model, pieces(batch, 2, context))
        assert torch.equal(engine.evaluate(pieces(batch, 2, context)), value)
        outcomes.append((value, export_llama(model, reduced(model, gradients))))
    return outcomes[0], outcomes[1]


def _check_custom_loss(built_in: Outcome, custom: Outcome) -> None:
    assert custom[0].dtype == torch.float32
    assert abs(custom[0] - built_in[0]) <= 1e-6 * built_in[0]
    errors = {n: relative_error(custom[1][n], built_in[1][n]) for n in built_in[1]}
    assert max(errors.values()) <= 1e-5, errors


def test_a_custom_loss_equals_the_built_in_one(context: ParallelContext) -> None:
    _check_custom_loss(*_with_built_in_and_custom_loss(context))


def _recomputed_and_kept(context: ParallelContext, dtype: torch.dtype) -> list[str]:
    """What differs when slots are made again: all choices, and other slots of each layer."""
    model = prepared(replace(CONFIG, hidden_dropout=0.1), context, dtype)
    micro_batches = pieces(batch_of(CONFIG, 3, 16), 2, context)
    kept = lower(model, recompute="none")
    expected = train(engine_of(kept), model, micro_batches)
    draw = random.Random(7)
    slots = sorted(kept.slots)
    layers = [*range(len(model.layers)), "head"]
    sets = [
        {layer: draw.sample(slots, draw.randrange(len(slots))) for layer in layers}
        for _ in range(12)
    ]
    wrong = []
    for what in (*CHOICES, *sets):
        plan = random_builder(draw.randrange(1000))
        engine = engine_of(lower(model, recompute=what), builder=plan, poison=True)
        differences = differing(train(engine, model, micro_batches), expected)
        wrong += [f"{what}: {one}" for one in differences]
    return wrong


class Block(nn.Module):
    """A residual MLP with dropout, of no kind that lowering knows."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.body = nn.Sequential(
                nn.Linear(width, 24), nn.GELU(), nn.Dropout(p), nn.Linear(24, width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _with_block(
    context: ParallelContext, p: float = 0.0, dtype: torch.dtype = torch.float32
) -> CausalLM:
    """Transformer layer, the block, transformer layer."""
    model = prepared(CONFIG, context, dtype)
    model.layers.insert(1, Block(CONFIG.hidden_size, p).to(dtype))
    add_main_grads(model)
    return model


def _block_gradients(context: ParallelContext) -> dict[str, Tensor]:
    model = _with_block(context)
    engine = engine_of(lower(model), poison=True)
    _, gradients = train(engine, model, pieces(batch_of(CONFIG, 5, 16), 2, context))
    gradients = reduced(model, gradients)
    return {name: gradients[name] for name, _ in model.named_parameters() if "body" in name}


def _on_rank(rank: int) -> dict[str, Any]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    return {
        "losses": _with_built_in_and_custom_loss(context),
        "recompute": [
            _recomputed_and_kept(context, dtype) for dtype in (torch.float32, torch.bfloat16)
        ],
        "block": _block_gradients(context),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, _on_rank)


def test_a_custom_loss_on_two_tensor_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for outcome in two_ranks:
        _check_custom_loss(*outcome["losses"])


def test_making_slots_again_changes_no_bit(
    context: ParallelContext, two_ranks: list[dict[str, Any]]
) -> None:
    assert _recomputed_and_kept(context, torch.float32) == []
    assert [outcome["recompute"] for outcome in two_ranks] == [[[], []], [[], []]]


def _autograd(model: CausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Megatron's modules and the block under plain autograd."""
    hidden = model.embedding(batch["tokens"], None)
    for layer in model.layers:
        if isinstance(layer, Block):
            hidden = layer(hidden)
        else:
            rotary = model.rotary(hidden.shape[0])
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
    logits = nn.functional.linear(model.final_norm(hidden), model.output_weight)
    loss = nn.functional.cross_entropy(
        logits[..., : CONFIG.vocab_size].flatten(0, 1), batch["labels"].t().flatten()
    )
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_module_of_the_users_own_joins_the_strands(context: ParallelContext) -> None:
    model, batch = _with_block(context), batch_of(CONFIG, 5, 16)
    lowered = lower(model)
    assert [pair.name for pair in lowered.layers] == [
        "embedding",
        "transformer",
        "Block",
        "transformer",
        "head",
    ]
    assert lowered.layers[2].saved == ("autograd",)
    loss, gradients = train(engine_of(lowered, poison=True), model, pieces(batch, 2, context))
    with context.megatron():
        expected_loss, expected = _autograd(model, batch)
    assert abs(loss - expected_loss) <= 1e-6 * expected_loss
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, errors


def test_a_module_of_the_users_own_on_two_tensor_ranks(
    context: ParallelContext, two_ranks: list[dict[str, Any]]
) -> None:
    alone = _block_gradients(context)
    assert len(alone) == 4
    for outcome in two_ranks:
        errors = {name: relative_error(outcome["block"][name], alone[name]) for name in alone}
        assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_plan_changes_a_module_with_dropout(
    context: ParallelContext, dtype: torch.dtype
) -> None:
    model = _with_block(context, p=0.3, dtype=dtype)
    lowered = lower(model)
    micro_batches = pieces(batch_of(CONFIG, 5, 8), 2, context)
    expected = train(engine_of(lowered, builder=BUILDERS["sequential"]), model, micro_batches)
    for builder in (*BUILDERS.values(), *map(random_builder, range(10))):
        torch.rand(3)
        engine = engine_of(lowered, builder=builder, poison=True)
        assert differing(train(engine, model, micro_batches), expected) == []
    still = _with_block(context, p=0.0, dtype=dtype)
    undropped = train(engine_of(lower(still)), still, micro_batches)
    assert not torch.equal(undropped[0], expected[0])


def test_modules_without_weights_or_with_frozen_ones(context: ParallelContext) -> None:
    model = _with_block(context)
    model.layers.insert(2, nn.Tanh())
    model.layers[1].body[0].weight.requires_grad_(False)
    add_main_grads(model)
    micro_batches = pieces(batch_of(CONFIG, 2, 8), 1, context)
    _, gradients = train(engine_of(lower(model), poison=True), model, micro_batches)
    assert "layers.1.body.0.weight" not in gradients
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in gradients.values())


@pytest.mark.parametrize(
    ("run", "block"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["bf16", "fp32"],
)
def test_a_module_in_another_type_than_the_run_is_refused(
    run: torch.dtype, block: torch.dtype, context: ParallelContext
) -> None:
    model = _with_block(context, dtype=run)
    model.layers[1].to(block)
    message = (
        f"layer 1, a Block, has parameter 'body.0.weight' in {block}, but hidden states are in"
        f" {run} in this run: build it in the dtype that build_model(context, dtype) is given"
    )
    with pytest.raises(ValueError) as error:
        lower(model)
    assert str(error.value) == message


def test_a_parameter_that_no_layer_uses_is_refused(context: ParallelContext) -> None:
    model = prepared(CONFIG, context)
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError) as error:
        lower(model)
    assert str(error.value) == (
        "parameter 'scale' requires a gradient, but no layer uses it, so it would never be trained:"
        " use it in a layer of model.layers, or freeze it with requires_grad_(False)"
    )
    model.scale.requires_grad_(False)
    lower(model)


BLOCKS = (attention, linear, mlp, norm, residual, transformer)
SUPPORTED = {name: values for block in BLOCKS for name, values in block.SUPPORTED.items()}
REFUSED = {
    "activation_func": nn.functional.relu,
    "attention_dropout": 0.1,
    "context_parallel_size": 2,
    "fp4": "e2m1",
    "fp8": "hybrid",
    "moe_layer_freq": 2,
    "mtp_num_layers": 1,
    "no_rope_freq": 4,
    "normalization": "L2Norm",
    "num_moe_experts": 8,
    "pipeline_model_parallel_size": 2,
    "recompute_granularity": "full",
    "softmax_type": "off-by-one",
    "window_size": (128, 0),
}


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name != "gated_linear_unit"])
def test_an_unsupported_configuration_is_refused_by_name(
    name: str, context: ParallelContext
) -> None:
    model = CausalLM(replace(CONFIG, num_layers=1), context)
    config = model.transformer_config
    assert hasattr(config, name), "Megatron-core does not know this field"
    lower(model)
    allowed = SUPPORTED[name]
    value = REFUSED.get(name, not allowed[0])
    assert value not in allowed
    setattr(config, name, value)
    shown = getattr(value, "__name__", repr(value))
    with pytest.raises(ValueError) as error:
        lower(model)
    assert f"TransformerConfig.{name}={shown} cannot be lowered" in str(error.value)
    shown = " or ".join(getattr(known, "__name__", repr(known)) for known in allowed)
    assert str(error.value).endswith(f"use {shown}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_func_clamp_value", 7.0),
        ("glu_linear_offset", 1.0),
        ("qk_l2_norm", True),
        ("linear_attention_freq", 4),
        ("experimental_attention_variant", "gated_delta_net"),
    ],
)
def test_fields_that_change_the_layers_numbers_are_refused(
    name: str, value: Any, context: ParallelContext
) -> None:
    model = CausalLM(replace(CONFIG, num_layers=1), context)
    assert hasattr(model.transformer_config, name)
    setattr(model.transformer_config, name, value)
    with pytest.raises(ValueError, match=rf"TransformerConfig\.{name}=.* cannot be lowered"):
        lower(model)


def test_another_megatron_layer_is_refused(context: ParallelContext) -> None:
    model = CausalLM(CONFIG, context)
    model.layers[1] = model.layers[1].mlp
    assert isinstance(model.layers[1], MLP)
    with pytest.raises(ValueError, match="layer 1 is a Megatron-core MLP, which has no lowering"):
        lower(model)


class OtherLinear(ColumnParallelLinear):  # type: ignore[misc]
    """What computes something else, for all that lowering knows."""


def _other_part(layer: Any, part: str) -> None:
    attention = layer.self_attention
    if part == "linear_fc1":
        layer.mlp.linear_fc1.__class__ = OtherLinear
    elif part == "mlp":
        layer.mlp = nn.Identity()
    elif part == "mask":
        attention.attn_mask_type = AttnMaskType.padding
    elif part == "q_layernorm":
        attention.q_layernorm = nn.Identity()
    elif part == "norms":
        attention.q_layernorm = attention.k_layernorm = nn.Identity()
    elif part == "wide norms":
        attention.q_layernorm = attention.k_layernorm = nn.LayerNorm(16)
    elif part == "cross_attention":
        layer.cross_attention = nn.Identity()
    else:
        layer.input_layernorm = nn.Identity()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("linear_fc1", "its linear_fc1 is a OtherLinear, .* Megatron-core's ColumnParallelLinear"),
        ("mlp", "its mlp is a Identity, .* use one of SelfAttention, MLP"),
        ("mask", "its attention has the mask padding: use attn_mask_type=AttnMaskType.causal"),
        ("q_layernorm", "its attention has no k_layernorm, but the other: .* both, or none"),
        ("norms", "its query norm is a Identity, .* a norm that has a weight and eps"),
        ("wide norms", "its q_layernorm is of 16 channels, .* a norm of one head's 8"),
        ("cross_attention", "its cross_attention is a Identity, .* Megatron-core's IdentityOp"),
        ("norm", "its attention norm is a Identity, .* a norm that has a weight and eps"),
    ],
)
def test_a_part_that_would_be_computed_otherwise_is_refused(
    part: str, message: str, context: ParallelContext
) -> None:
    model = CausalLM(CONFIG, context)
    _other_part(model.layers[1], part)
    with pytest.raises(ValueError, match=f"^layer 1: {message}"):
        lower(model)


class Counted:
    """The reference of an operator, which counts its calls."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if callable(value):
            self.calls[name] += 1
        return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_operator_is_computed_by_the_backend_that_was_asked_for(
    dtype: torch.dtype, context: ParallelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, hidden_dropout=0.1, linear_bias=True)
    counted = {}
    for operator, candidates in CANDIDATES.items():
        if operator in ("attention", "packed_attention"):
            continue
        counted[operator] = Counted(candidates["reference"].load())
        mine = Candidate(lambda o=operator: counted[o], lambda device, dtype: None)
        monkeypatch.setitem(candidates, "mine", mine)
    model = CausalLM(config, context, dtype)
    add_main_grads(model)
    micro_batches = pieces(batch_of(config, 2, 8), 1, context)
    expected = train(engine_of(lower(model)), model, micro_batches)
    lowered = lower(model, kernels=dict.fromkeys(counted, "mine"))
    assert differing(train(engine_of(lowered), model, micro_batches), expected) == []
    used = {operator for operator, backend in counted.items() if backend.calls}
    assert used >= {"cross_entropy", "dropout", "embedding", "linear", "rms_norm", "rope", "swiglu"}
    assert {*counted["linear"].calls} >= {
        "forward", "dgrad", "accumulate_wgrad", "accumulate_bias_grad"
    }  # fmt: skip
    assert {*counted["embedding"].calls} == {"forward", "accumulate_wgrad"}


class LargestWithColumns(TorchDispatchMode):
    """Most rows of an fp32 tensor whose last dimension is one of `columns`."""

    def __init__(self, columns: set[int]) -> None:
        super().__init__()
        self.columns, self.rows, self.seen = columns, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.dim() and value.shape[-1] in self.columns:
                self.seen += 1
                if value.dtype is torch.float32:
                    self.rows = max(self.rows, value.numel() // value.shape[-1])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fp32_logits_of_a_whole_micro_batch_never_exist(
    dtype: torch.dtype, context: ParallelContext
) -> None:
    config = ModelConfig(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=20,
        num_attention_heads=2,
        num_query_groups=1,
        vocab_size=45,
        max_sequence_length=1024,
    )
    model = CausalLM(config, context, dtype)
    add_main_grads(model)
    lowered = lower(model)
    (piece,) = pieces(batch_of(config, 2, cross_entropy.CHUNK // 2 + 100), 2, context)
    assert piece.tokens > cross_entropy.CHUNK
    engine = engine_of(lowered)
    with LargestWithColumns({config.vocab_size, config.padded_vocab_size(1)}) as spy:
        engine.train([piece])
        engine.evaluate([piece])
    assert spy.seen > 0 and spy.rows == cross_entropy.CHUNK
