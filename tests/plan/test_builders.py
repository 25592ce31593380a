"""The built-in plans, in their printed language."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightning_dhellam.layers import Lowered
from lightning_dhellam.plan import BUILDERS, Barrier, Graph, Issue, Plan, Strand, builder, validate
from tests.plan.real_graphs import lowered

SIZES = (1, 2)


@pytest.fixture(scope="module")
def models() -> dict[int, Lowered]:
    return {size: lowered(size, dtype=torch.bfloat16) for size in SIZES}


def _names(plan: Plan, strand: Strand) -> list[str]:
    return sorted(row.operator for row in plan.issues if row.strand is strand)


def _operators(graph: Graph | None) -> list[str]:
    return sorted(operator.name for operator in graph.operators) if graph else []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_operator_is_issued_exactly_once(
    name: str, size: int, models: dict[int, Lowered]
) -> None:
    layers = models[size].layers
    graphs = [(a.forward, b.backward) for a in layers for b in layers]
    graphs += [(pair.forward, None) for pair in layers] + [(None, p.backward) for p in layers]
    for forward, backward in (*graphs, (models[size].logits, None)):
        plan = BUILDERS[name](forward, backward)
        assert plan.name == name
        assert _names(plan, Strand.FORWARD) == _operators(forward)
        assert _names(plan, Strand.BACKWARD) == _operators(backward)
        validate(plan, forward, backward)


@pytest.mark.parametrize("name", BUILDERS)
def test_no_strand_no_rows(name: str) -> None:
    plan = BUILDERS[name](None, None)
    assert plan == Plan(name, None, None, ())


def test_sequential_keeps_default_order_with_a_barrier_after_each_communication(
    models: dict[int, Lowered],
) -> None:
    pair = models[2].layers[1]
    plan = BUILDERS["sequential"](pair.forward, pair.backward)
    expected = [*pair.forward.operators, *pair.backward.operators]
    assert [row.operator for row in plan.issues] == [operator.name for operator in expected]
    for row, following in pairwise(plan.rows):
        communicates = isinstance(row, Issue) and row.lane != "compute"
        assert isinstance(following, Barrier) == communicates


def test_interleaved_has_no_barrier_and_mixes_the_strands(models: dict[int, Lowered]) -> None:
    for size in SIZES:
        layers = models[size].layers
        for ahead in layers:
            for behind in layers:
                plan = BUILDERS["interleaved"](ahead.forward, behind.backward)
                assert len(plan.rows) == len(plan.issues)
    pair = models[2].layers[1]
    strands = [row.strand for row in BUILDERS["interleaved"](pair.forward, pair.backward).issues]
    assert sum(a is not b for a, b in pairwise(strands)) > 8


def test_interleaved_hands_over_forward_early_where_nothing_communicates(
    models: dict[int, Lowered],
) -> None:
    pair = models[1].layers[1]
    assert not pair.forward.moves and models[2].layers[1].forward.moves
    issued = BUILDERS["interleaved"](pair.forward, pair.backward).issues
    assert [row.operator for row in issued] == [
        operator.name for graph in (pair.forward, pair.backward) for operator in graph.operators
    ]


def test_interleaved_issues_communication_with_other_compute_behind_it(
    models: dict[int, Lowered],
) -> None:
    pair = models[2].layers[1]
    plan = BUILDERS["interleaved"](pair.forward, pair.backward)
    exposed = []
    for index, row in enumerate(plan.issues):
        if row.lane == "compute":
            continue
        graph = pair.forward if row.strand is Strand.FORWARD else pair.backward
        following = [r for r in plan.issues[index + 1 :] if r.lane == "compute"][:1]
        waits = [
            r
            for r in following
            if r.strand is row.strand and row.operator in graph.predecessors[r.operator]
        ]
        exposed += waits
    # At the very end of the pair nothing else is left to compute.
    assert len(exposed) <= 1, f"{exposed}\n{plan}"


def _blocks(plan: Plan) -> list[list[Issue]]:
    blocks: list[list[Issue]] = [[]]
    for row in plan.rows:
        if isinstance(row, Barrier):
            blocks.append([])
        else:
            blocks[-1].append(row)
    assert not blocks.pop(), "no barrier behind the last block"
    return blocks


@pytest.mark.parametrize("size", SIZES)
def test_dhellam_pairs_blocks_of_opposite_kinds_with_a_barrier_after_each(
    size: int, models: dict[int, Lowered]
) -> None:
    pair = models[size].layers[1]
    for forward, backward in (
        (pair.forward, pair.backward),
        (pair.forward, None),
        (None, pair.backward),
    ):
        plan = BUILDERS["dhellam"](forward, backward)
        paired = 0
        for block in _blocks(plan):
            kinds = {
                strand: {row.lane != "compute" for row in block if row.strand is strand}
                for strand in Strand
            }
            assert all(len(kind) <= 1 for kind in kinds.values()), block
            ahead, behind = kinds[Strand.FORWARD], kinds[Strand.BACKWARD]
            if ahead and behind:
                assert ahead != behind, block
                assert block[0].lane != "compute", "communication starts first"
                paired += 1
        both = forward is not None and backward is not None
        assert (paired >= 8) == (both and size > 1)
        for graph in filter(None, (forward, backward)):
            order = [row.operator for row in plan.issues if row.strand is graph.direction]
            assert order == [operator.name for operator in graph.operators]


MEGATRON = """\
plan megatron: forward transformer, backward transformer
  0  forward   compute  attention.norm
  1  forward   tp       qkv.gather
  -  barrier
  2  forward   compute  qkv.gemm
  3  forward   compute  rope
  4  forward   compute  attention
  5  forward   compute  proj.gemm
  6  forward   tp       proj.scatter
  -  barrier
  7  forward   compute  attention.residual
  8  forward   compute  mlp.norm
  9  forward   tp       fc1.gather
  -  barrier
 10  forward   compute  fc1.gemm
 11  forward   compute  swiglu
 12  forward   compute  fc2.gemm
 13  forward   tp       fc2.scatter
  -  barrier
 14  forward   compute  mlp.residual
 15  backward  tp       fc2.grad_gather
  -  barrier
 16  backward  compute  fc2.dgrad
 17  backward  compute  fc2.wgrad
 18  backward  compute  swiglu.grad
 19  backward  tp       fc1.gather.again
 20  backward  compute  fc1.dgrad
  -  barrier
 21  backward  tp       fc1.grad_scatter
 22  backward  compute  fc1.wgrad
  -  barrier
 23  backward  compute  mlp.norm.grad
 24  backward  tp       proj.grad_gather
  -  barrier
 25  backward  compute  proj.dgrad
 26  backward  compute  proj.wgrad
 27  backward  compute  attention.grad
 28  backward  compute  rope.grad
 29  backward  tp       qkv.gather.again
 30  backward  compute  qkv.dgrad
  -  barrier
 31  backward  tp       qkv.grad_scatter
 32  backward  compute  qkv.wgrad
  -  barrier
 33  backward  compute  attention.norm.grad"""
MEGATRON_HEAD = """\
plan megatron: forward -, backward head
  0  backward  compute  loss.grad
  1  backward  tp       output.gather.again
  2  backward  compute  output.dgrad
  -  barrier
  3  backward  tp       output.grad_scatter
  4  backward  compute  output.wgrad
  -  barrier
  5  backward  compute  final.norm.grad"""


def test_megatron_hides_regathers_under_dgrad_and_scatters_under_wgrad_only(
    models: dict[int, Lowered],
) -> None:
    _, layer, *_, head = models[2].layers
    assert str(BUILDERS["megatron"](layer.forward, layer.backward)) == MEGATRON
    assert str(BUILDERS["megatron"](None, head.backward)) == MEGATRON_HEAD


RINGS = """
plan megatron: forward transformer, backward transformer
  0  forward   compute  attention.norm
  1  forward   compute  qkv.gemm
  2  forward   compute  rope
  3  forward   compute  attention.keys
  4  forward   cp       keys.exchange.1
  5  forward   compute  attention.0
  -  barrier
  6  forward   cp       keys.exchange.2
  7  forward   compute  attention.1
  8  forward   compute  attention.merge.1
  -  barrier
  9  forward   compute  attention.2
 10  forward   compute  attention.merge.2
 11  forward   compute  proj.gemm
 12  forward   compute  attention.residual
 13  forward   compute  mlp.norm
 14  forward   compute  fc1.gemm
 15  forward   compute  swiglu
 16  forward   compute  fc2.gemm
 17  forward   compute  mlp.residual
 18  backward  compute  fc2.dgrad
 19  backward  compute  fc2.wgrad
 20  backward  compute  swiglu.grad
 21  backward  compute  fc1.dgrad
 22  backward  compute  fc1.wgrad
 23  backward  compute  mlp.norm.grad
 24  backward  compute  proj.dgrad
 25  backward  compute  proj.wgrad
 26  backward  compute  attention.grad.keys
 27  backward  cp       keys_again.exchange.1
 28  backward  compute  attention.grad.0
  -  barrier
 29  backward  cp       keys_again.exchange.2
 30  backward  compute  attention.grad.1
  -  barrier
 31  backward  cp       keys.grad.exchange.1
 32  backward  compute  attention.grad.2
  -  barrier
 33  backward  compute  keys.grad.add.2
 34  backward  cp       keys.grad.exchange.2
  -  barrier
 35  backward  compute  attention.grad.join
 36  backward  compute  rope.grad
 37  backward  compute  qkv.dgrad
 38  backward  compute  qkv.wgrad
 39  backward  compute  attention.norm.grad
"""


def test_megatron_hides_a_ring_under_its_own_attention_only() -> None:
    pair = lowered(1, context_parallel_size=3).layers[1]
    plan = BUILDERS["megatron"](pair.forward, pair.backward)
    assert str(plan) == RINGS.strip()
    validate(plan, pair.forward, pair.backward)


@pytest.mark.parametrize("way", ["ring", "all_gather"])
def test_a_shared_sequence_is_planned_by_every_builder(way: str) -> None:
    pair = lowered(2, context_parallel_size=4, context_exchange=way).layers[1]
    for name in BUILDERS:
        validate(BUILDERS[name](pair.forward, pair.backward), pair.forward, pair.backward)
    ring = [o for o in (*pair.forward.operators, *pair.backward.operators) if o.lane == "cp"]
    assert len(ring) == (9 if way == "ring" else 3)
    # Keys of other ranks come again in backward.
    assert pair.saved_bytes(64) == lowered(2).layers[1].saved_bytes(64)


def test_without_communication_only_dhellam_has_barriers(models: dict[int, Lowered]) -> None:
    pair = models[1].layers[1]
    for name in ("sequential", "megatron"):
        plan = BUILDERS[name](pair.forward, pair.backward)
        order = [operator.name for operator in (*pair.forward.operators, *pair.backward.operators)]
        assert [str(row).split()[-1] for row in plan.rows] == order


def test_an_unknown_plan_is_answered_with_the_known_ones() -> None:
    assert builder("megatron") is BUILDERS["megatron"]
    known = r"use one of \['sequential', 'megatron', 'dhellam', 'interleaved'\]"
    with pytest.raises(
        ValueError,
        match=f"plan='interleave' is not a known plan: {known}, .*; did you mean 'interleaved'",
    ):
        builder("interleave")
    with pytest.raises(
        ValueError, match=f"plan='xyz' is not a known plan: {known}, 'auto' .*json$"
    ):
        builder("xyz")
