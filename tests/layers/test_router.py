"""The operators of a router against Megatron-core's, with every gradient and all losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from lightning_dhellam.kernels.choose import choose
from lightning_dhellam.layers.block import Setting
from lightning_dhellam.layers.router import Router
from lightning_dhellam.layers.writer import GraphWriter, Sizes
from lightning_dhellam.parallel import ParallelContext, zigzag
from lightning_dhellam.parallel.collectives import Pending, reduced
from lightning_dhellam.parallel.tally import Tally
from lightning_dhellam.plan import Graph, GraphPair, Strand
from tests.engine.harness import CPU, add_main_grads
from tests.layers.routers import (
    BATCH,
    CONTEXT,
    EXPERTS,
    HIDDEN,
    SEQUENCE,
    make_router,
    router_config,
)
from tests.ranks import run_ranks
from tests.strategy.test_no_waiting import Reads, watched

TOKENS = SEQUENCE * BATCH
BALANCED = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.3, 0.7, 0.2],
    "moe_z_loss_coeff": 0.05,
}

WIDTHS = {
    "load": EXPERTS,
    "load_balancing_loss": 1,
    "seq_load_balancing_loss": 1,
    "global_load_balancing_loss": 1,
    "z_loss": 1,
}
"""Numbers of each sum of a tally."""


def _graphs(router: Router, sizes: Sizes) -> GraphPair:
    """Both directions of a layer that is a router alone."""
    ahead = GraphWriter("router", Strand.FORWARD, sizes)
    router.forward(ahead, "x")
    back = GraphWriter("router", Strand.BACKWARD, sizes)
    router.backward(back, "d_probs", "x")
    return GraphPair(
        ahead.graph({"x": sizes.shard}, ("probs", "chosen")),
        back.graph({"d_probs": 1.0}, ("d_x_router",)),
    )


def _run(graph: Graph, slots: dict[str, Any]) -> None:
    with torch.no_grad():
        for operator in graph.operators:
            result = operator.run(*(slots[name] for name in operator.reads))
            if isinstance(result, Pending):
                if result.work is not None:
                    result.work.wait()
                result = result.value
            values = result if len(operator.writes) > 1 else (result,) * len(operator.writes)
            slots.update(zip(operator.writes, values, strict=True))


def _lowered(module: Any, dtype: torch.dtype, context: ParallelContext = CONTEXT) -> GraphPair:
    sizes = Sizes(context, dtype, HIDDEN, SEQUENCE)
    setting = Setting(sizes, choose(CPU, dtype), None, index=3)
    return _graphs(Router.of(module, setting), sizes)


def _both(
    fields: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tally]:
    """Results and gradients by operators and by Megatron-core, of one micro-batch of one."""
    config = router_config(params_dtype=dtype, **fields)
    module = make_router(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    add_main_grads(module)
    x = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).to(dtype)
    d_probs = torch.randn(TOKENS, EXPERTS, generator=generator)
    leaf = x.clone().requires_grad_()
    with CONTEXT.megatron():
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
        probs, _ = module(leaf)
        (probs * d_probs).sum().backward()
    expected = {"probs": probs.detach().float(), "dx": leaf.grad} | {
        name: p.grad for name, p in module.named_parameters()
    }
    pair, tally = _lowered(module, dtype), Tally()
    of_batch = {"batch.padding": None, "batch.token_share": 1 / TOKENS, "batch.tally": tally}
    slots: dict[str, Any] = {"x": x, **of_batch}
    _run(pair.forward, slots)
    kept = {name: slots[name] for name in (*pair.saved, *of_batch)}
    whole = torch.cat([d_probs, torch.zeros(TOKENS, 1)], 1)
    kept["d_probs"] = whole.gather(1, slots["chosen"])
    _run(pair.backward, kept)
    weights = torch.zeros(TOKENS, EXPERTS + 1).scatter(1, slots["chosen"], slots["probs"].float())
    actual = {"probs": weights[:, :EXPERTS], "dx": kept["d_x_router"]} | {
        name: p.main_grad
        for name, p in module.named_parameters()  # type: ignore[attr-defined]
    }
    return actual, expected, tally


@pytest.mark.parametrize(
    "fields",
    [
        {},
        BALANCED,
        {**BALANCED, "moe_router_score_function": "sigmoid", "moe_router_topk": 4},
        {**BALANCED, "moe_router_pre_softmax": True, "add_bias_linear": True},
        {**BALANCED, "moe_expert_capacity_factor": 0.8, "moe_token_drop_policy": "probs"},
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5},
        {"moe_router_dtype": "fp64", "moe_z_loss_coeff": 0.1},
        {"moe_router_dtype": None},
    ],
    ids=["plain", "balanced", "sigmoid", "bias", "dropped", "sequences", "fp64", "as-activations"],
)
def test_results_and_gradients_are_megatrons(fields: dict[str, Any]) -> None:
    actual, expected, _ = _both(fields)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        limit = 1e-6 if name == "probs" else 1e-5
        error = (actual[name] - value).abs().max() / value.abs().max()
        assert error <= limit, (name, error)


@pytest.mark.parametrize("precise", ["fp32", None])
def test_in_bf16_it_is_about_as_far_from_the_truth_as_megatron(precise: str | None) -> None:
    actual, expected, _ = _both({**BALANCED, "moe_router_dtype": precise}, torch.bfloat16)
    for name, value in expected.items():
        error = (actual[name].float() - value.float()).abs().max() / value.float().abs().max()
        assert error <= 2e-2, (name, error)


def test_nothing_is_read_on_the_host() -> None:
    fields = {**BALANCED, "moe_expert_capacity_factor": 0.8}
    module = make_router(router_config(**fields))
    torch.nn.init.normal_(module.weight)
    add_main_grads(module)
    pair, reads = _lowered(module, torch.float32), Reads(set())
    slots: dict[str, Any] = {
        "x": torch.randn(SEQUENCE, BATCH, HIDDEN),
        "batch.padding": torch.arange(SEQUENCE)[:, None].expand(SEQUENCE, BATCH) > 9,
        "batch.token_share": torch.tensor(1.0 / (10 * BATCH)),
        "batch.tally": Tally(),
        "d_probs": torch.ones(TOKENS, 2),
    }
    with watched(reads):
        _run(pair.forward, slots)
        _run(pair.backward, slots)
    assert reads.found == []


def test_losses_and_load_are_tallied() -> None:
    _, _, tally = _both(BALANCED)
    sums = tally.everywhere(WIDTHS, [2, 3], None, CPU)
    assert all(not value[0].any() for value in sums.values()), "layer 2 has no experts"
    assert sums["load"][1].sum() == 2 * TOKENS
    # Of one micro-batch the whole batch is its own.
    assert sums["global_load_balancing_loss"][1] == sums["load_balancing_loss"][1]
    assert sums["seq_load_balancing_loss"][1] >= sums["load_balancing_loss"][1] > 0.9
    assert sums["z_loss"][1] > 0


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn'"),
        ({"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": 0.1}, None),
        (
            {
                "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
                "moe_aux_loss_coeff": [0.1],
            },
            "one coefficient for each",
        ),
        (
            {
                "moe_router_load_balancing_type": ["aux_loss", "aux_loss"],
                "moe_aux_loss_coeff": [0.1, 0.1],
            },
            "has a loss twice",
        ),
        ({"moe_input_jitter_eps": 0.1}, "moe_input_jitter_eps=0.1"),
        ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing=True"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True"),
        ({"moe_router_score_function": "cosine"}, "moe_router_score_function='cosine'"),
    ],
)
def test_what_is_not_lowered_is_refused_by_name(fields: dict[str, Any], text: str | None) -> None:
    module = make_router(router_config())
    for name, value in fields.items():
        setattr(module.config, name, value)
    if text is None:
        _lowered(module, torch.float32)
        return
    with pytest.raises(ValueError, match=text):
        _lowered(module, torch.float32)


def test_a_router_of_another_class_is_refused() -> None:
    module = make_router(router_config())
    module.__class__ = type("Mine", (type(module),), {})
    with pytest.raises(ValueError, match="layer 3: its router is a Mine"):
        _lowered(module, torch.float32)


Step = tuple[Tensor, dict[str, Tensor]]
"""The gradient of the router's weight, and the sums of the tally."""


def _step(context: ParallelContext, fields: dict[str, Any], cut: list[int]) -> Step:
    """One step on samples of which each micro-batch of the whole world has as many as `cut` says.

    Data-parallel ranks take turns with them.
    """
    module = make_router(router_config(**fields))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(module.weight, std=0.5, generator=generator)
    add_main_grads(module)
    samples, topology = sum(cut), context.topology
    x = torch.randn(SEQUENCE, samples, HIDDEN, generator=generator)
    tally, pair = Tally(), _lowered(module, torch.float32, context)
    for piece in [*x.split(cut, dim=1)][topology.dp_rank :: topology.dp_size]:
        own = zigzag.own_part(piece, 0, topology.cp_rank, topology.cp_size)
        own = own.chunk(topology.tp_size)[topology.tp_rank].contiguous()
        slots = {
            "x": own,
            "batch.padding": None,
            "batch.token_share": torch.tensor(1 / (SEQUENCE * samples)),
            "batch.tally": tally,
        }
        _run(pair.forward, slots)
        slots["d_probs"] = torch.zeros_like(slots["probs"])
        _run(pair.backward, slots)
    grad: Tensor = module.weight.main_grad
    group = context.world_group if topology.world_size > 1 else None
    return reduced(grad, group, "sum"), tally.everywhere(WIDTHS, [3], group, CPU)


def _only(kind: str) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.5}


def _on_ranks(rank: int) -> None:
    alone = CONTEXT
    for sizes, dp in (
        ({"tensor_parallel_size": 2, "context_parallel_size": 2}, 1),
        ({"tensor_parallel_size": 2}, 2),
        ({"context_parallel_size": 2}, 2),
    ):
        context = ParallelContext.create(CPU, **sizes)  # type: ignore[arg-type]
        for fields, cut, same in (
            # A micro-batch is balanced by itself, and a sequence too, whoever has it.
            ({**_only("aux_loss"), "moe_z_loss_coeff": 0.1}, [2, 2], [2, 2]),
            (_only("seq_aux_loss"), [2, 2], [4]),
            # All that ranks compute at the same time is balanced together.
            (_only("global_aux_loss"), [2] * dp, [2 * dp]),
        ):
            expected, actual = _step(alone, fields, same), _step(context, fields, cut)
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=0)
            assert expected[0].abs().max() > 1e-4 and expected[1]["load"].sum() > 0
        context.destroy()


def test_ranks_balance_what_one_rank_balances() -> None:
    run_ranks(4, _on_ranks)


def test_global_balance_counts_the_micro_batches_of_a_step_so_far() -> None:
    """As Megatron-core's, which averages their counts: the second looks at both."""
    grad, sums = _step(CONTEXT, _only("global_aux_loss"), [2, 2])
    config = router_config(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.5)
    module = make_router(config)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(module.weight, std=0.5, generator=generator)
    x = torch.randn(SEQUENCE, 4, HIDDEN, generator=generator)
    with CONTEXT.megatron():
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.5))  # two micro-batches
        for piece in x.split(2, dim=1):
            probs, _ = module(piece.contiguous())
            (0 * probs).sum().backward()
    torch.testing.assert_close(grad, module.weight.grad, rtol=1e-5, atol=1e-7)
    assert sums["load"].sum() == 2 * 4 * SEQUENCE
