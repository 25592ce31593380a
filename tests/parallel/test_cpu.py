"""Megatron-core's model, DDP and optimizers on the CPU with gloo: the stand-in must carry them."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_dhellam.models import ModelConfig
from lightning_dhellam.models.norm import RMSNorm
from lightning_dhellam.models.spec import llama_layer_spec
from lightning_dhellam.parallel import ParallelContext, megatron_device
from lightning_dhellam.versions import QUIET_FIELDS
from tests.ranks import run_ranks

CPU = torch.device("cpu")
VOCABULARY, SEQUENCE, BATCH, STEPS = 64, 8, 4, 3
REPLACED = (
    "current_device",
    "synchronize",
    "is_initialized",
    "default_generators",
    "get_rng_state",
    "set_rng_state",
    "manual_seed",
    "stream",
)


def test_allocations_that_name_cuda_land_on_the_cpu() -> None:
    with megatron_device(CPU):
        device = torch.cuda.current_device()
        tensors = [
            torch.empty(2, device="cuda"),
            torch.zeros(2, device=torch.device("cuda", 0)),
            torch.tensor([1.0], device="cuda:0", pin_memory=True),
            torch.ones(2, device=device),
            torch.ones(2).cuda(),
            torch.ones(2).to("cuda"),
            torch.ones(2).to(device="cuda", dtype=torch.bfloat16),
        ]
        torch.cuda.synchronize()
    assert {tensor.device for tensor in tensors} == {CPU}
    assert tensors[-1].dtype == torch.bfloat16


def test_tensor_type_answers_with_the_cuda_name() -> None:
    tensor = torch.ones(2)
    with megatron_device(CPU):
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type("torch.cuda.HalfTensor").dtype == torch.float16
        assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type() == "torch.FloatTensor"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without CUDA")
def test_everything_is_restored_even_after_an_error_and_when_nested() -> None:
    before = {name: getattr(torch.cuda, name) for name in REPLACED}
    with pytest.raises(ZeroDivisionError), megatron_device(CPU):
        with megatron_device(CPU):
            pass
        assert torch.cuda.current_device() == CPU, "the inner exit must not end the outer one"
        assert torch.empty(1, device="cuda").device == CPU
        _ = 1 / 0
    assert {name: getattr(torch.cuda, name) for name in REPLACED} == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.empty(1, device="cuda")


def test_nothing_changes_on_a_cuda_device() -> None:
    before = {name: getattr(torch.cuda, name) for name in REPLACED}
    with megatron_device(torch.device("cuda", 0)):
        assert {name: getattr(torch.cuda, name) for name in REPLACED} == before


def test_forked_generators_are_seeded_by_tensor_rank_and_leave_the_callers_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def masks(tp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        model_parallel_cuda_manual_seed(5, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
        ones = torch.ones(64)
        with get_cuda_rng_tracker().fork():
            forked = torch.nn.functional.dropout(ones, 0.5)
        return forked, torch.nn.functional.dropout(ones, 0.5)

    with torch.random.fork_rng(devices=[]), megatron_device(CPU):
        queued = len(torch.cuda._queued_calls)
        with caplog.at_level(logging.WARNING):
            forked, plain = zip(*(masks(rank) for rank in (0, 1, 0)), strict=True)
        assert len(torch.cuda._queued_calls) == queued, "states must not pile up in torch's queue"
    assert torch.equal(forked[0], forked[2]) and not torch.equal(forked[0], forked[1])
    assert torch.equal(plain[0], plain[1]), "outside the fork every rank draws the same"
    assert not caplog.records


def _build_model(context: ParallelContext, dtype: torch.dtype) -> GPTModel:
    shape = ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
    )
    config = shape.transformer_config(context, dtype)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    layers = [llama_layer_spec(shape.ffn_hidden_size)] * shape.num_layers
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        pg_collection=context.groups,
    )


def _build_optimizer(
    ddp: DistributedDataParallel, context: ParallelContext, dtype: torch.dtype, distributed: bool
) -> MegatronOptimizer:
    user = torch.optim.AdamW(ddp.parameters(), lr=0.01, weight_decay=0.1)
    for group in user.param_groups:
        group["is_expert_parallel"] = False
    config = OptimizerConfig(
        lr=0.01,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        clip_grad=1.0,
    )
    optimizer: MegatronOptimizer
    if distributed:
        optimizer = DistributedOptimizer(
            user,
            config,
            None,
            None,
            model_chunks=[ddp],
            per_model_buffers={0: ddp.buffers},
            data_parallel_group=context.groups.dp_cp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=context.topology.tp_rank,
            distributed_optimizer_instance_id=0,
        )
        optimizer.grad_stats_parallel_group = context.groups.intra_dist_opt
    else:
        kind = Float16OptimizerWithFloat16Params if config.bf16 else FP32Optimizer
        arguments = (user, config, None, None) if config.bf16 else (user, config, None)
        optimizer = kind(*arguments)
        optimizer.grad_stats_parallel_group = context.groups.mp
    optimizer.tp_group = context.groups.tp
    return optimizer


def _train(context: ParallelContext, dtype: torch.dtype, distributed: bool) -> list[float]:
    """Losses of the global batch, and gradient norms, of a few steps."""
    with megatron_device(context.device):
        model = _build_model(context, dtype)
        ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
            ),
            model,
            pg_collection=context.groups,
        )
        optimizer = _build_optimizer(ddp, context, dtype, distributed)
        tokens = torch.randint(
            VOCABULARY, (STEPS, BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(1)
        ).chunk(context.topology.dp_size, dim=1)[context.topology.dp_rank]
        positions = torch.arange(SEQUENCE).unsqueeze(0)
        values = []
        for batch in tokens:
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            loss = ddp(batch[:, :-1], positions, None, labels=batch[:, 1:]).float().mean()
            loss.backward()
            finalize_model_grads([ddp], pg_collection=context.groups)
            successful, norm, _ = optimizer.step()
            assert successful
            total = loss.detach().clone()
            dist.all_reduce(total, group=context.groups.dp)
            values += [total.item() / context.topology.dp_size, float(norm)]
        return values


def _train_all(rank: int, tensor_parallel_size: int) -> dict[tuple[str, bool], list[float]]:
    context = ParallelContext.create(CPU, tensor_parallel_size=tensor_parallel_size)
    results = {
        (str(dtype), distributed): _train(context, dtype, distributed)
        for dtype in (torch.float32, torch.bfloat16)
        for distributed in (False, True)
    }
    context.destroy()
    return results


def test_tensor_and_data_parallel_training_follows_one_process() -> None:
    (alone,) = run_ranks(1, _train_all, 1)
    together = run_ranks(4, _train_all, 2)
    assert all(result == together[0] for result in together), "ranks disagree"
    expected, (result, *_) = alone["torch.float32", False], together
    assert expected[-2] < expected[0], "the loss must fall"
    for distributed in (False, True):
        torch.testing.assert_close(
            result["torch.float32", distributed], expected, rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            result["torch.bfloat16", distributed], expected, rtol=0.01, atol=0
        )
    for dtype in ("torch.float32", "torch.bfloat16"):
        # The distributed optimizer shards the state only: the gradient norm, which scales every
        # update, is summed in another order, all else is equal.
        torch.testing.assert_close(result[dtype, True], result[dtype, False], rtol=1e-6, atol=0)


def _experts(context: ParallelContext) -> MoELayer:
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0, tp_rank=0, ep_rank=0, etp_rank=0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        moe_ffn_hidden_size=24,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=context.topology.ep_size,
        add_bias_linear=False,
        **QUIET_FIELDS,
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    return MoELayer(config, MoESubmodules(experts=experts), 1, context.groups)


def _run_experts(rank: int) -> None:
    """Two ranks exchange tokens, and compute what each computes with all experts."""
    torch.manual_seed(rank)
    x = torch.randn(6, 2, 16)
    results = []
    whole: MoELayer | None = None
    for context in (
        ParallelContext.single(CPU),
        ParallelContext.create(CPU, expert_parallel_size=2),
    ):
        with context.megatron():
            layer = _experts(context)
            if whole is None:
                whole = layer
            layer.router.load_state_dict(whole.router.state_dict())
            held = layer.local_expert_indices
            for own, index in zip(layer.experts.local_experts, held, strict=True):
                own.load_state_dict(whole.experts.local_experts[index].state_dict())
            read = x.clone().requires_grad_()
            y, _ = layer(read)
            y.square().sum().backward()
        results.append((y.detach(), read.grad, layer.router.weight.grad))
    for alone, exchanged in zip(*results, strict=True):
        torch.testing.assert_close(exchanged, alone, rtol=1e-5, atol=1e-6)


def test_experts_run_on_the_cpu_and_exchange_tokens() -> None:
    """The router does without transformer-engine; the exchange takes tensors for sizes."""
    before = MoEAlltoAllTokenDispatcher.cuda_dtoh_stream, moe_utils.te_general_gemm
    run_ranks(2, _run_experts)
    with megatron_device(CPU):
        assert moe_utils.te_general_gemm is None
    now = MoEAlltoAllTokenDispatcher.cuda_dtoh_stream, moe_utils.te_general_gemm
    assert now == before, "nothing remains"
