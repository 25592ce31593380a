"""What cutting sequences costs: one rank's attention, beside its share of that to the whole."""

from __future__ import annotations

import re

import torch

from lightning_dhellam.bench.workload import Workload
from lightning_dhellam.engine import OperatorTimer, Subject
from lightning_dhellam.kernels.choose import choose
from lightning_dhellam.plan import Lane, Operator
from lightning_dhellam.search.model import Costs

_PARTS = re.compile(r"attention\.(keys|\d+|merge\.\d+|grad\.(\d+|join|keys))|keys\.grad\.add\.\d+")
"""Operators that one `attention`, and one `attention.grad`, of whole sequences would be."""


def cost_of_cutting(work: Workload, costs: Costs, length: int, micro_batch: int) -> float:
    """How many times as long one rank's attention takes as its share of the uncut one.

    Both are forward and backward, each kernel alone; packing keys and adding up what comes of hops
    are counted, what the ranks send each other is not.

    Args:
        work: whose layers share sequences.
        costs: of its operators.
        length: of the whole sequences.
        micro_batch: how many of them.
    """
    pair = work.layers[1]
    parts = [
        (graph, operator.name)
        for graph in (pair.forward, pair.backward)
        for operator in graph.operators
        if operator.computes and _PARTS.fullmatch(operator.name)
    ]
    cut = sum(costs.alone(*part) for part in parts)
    ranks = work.model.context.topology.cp_size
    return ranks * cut / _whole(work, length, micro_batch)


def _whole(work: Workload, length: int, micro_batch: int) -> float:
    """Seconds of forward and backward over whole sequences, of this rank's heads."""
    config, context = work.model.config, work.model.context
    ranks, width = context.topology.tp_size, config.kv_channels
    dtype = work.model.transformer_config.params_dtype
    attention = choose(context.device, dtype, head=width).attention

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(length, micro_batch, *shape, device=context.device, dtype=dtype)

    queries, groups = config.num_attention_heads // ranks, config.num_query_groups // ranks
    q, k, v = draw(queries, width), draw(groups, width), draw(groups, width)
    dout, scale = draw(queries * width), width**-0.5
    with torch.no_grad():
        out, lse, state = attention.forward(q, k, v, scale)
    ahead = Operator(
        "attention", Lane.COMPUTE, (), (), lambda: attention.forward(q, k, v, scale), 1e-12
    )
    back = Operator(
        "attention.grad",
        Lane.COMPUTE,
        (),
        (),
        lambda: attention.backward(dout, q, k, v, out, lse, state, scale),
        1e-12,
    )
    timer = OperatorTimer(work.lanes, None)
    found = (sorted(timer.alone(Subject(operator, ()))) for operator in (ahead, back))
    return sum(times[len(times) // 2] for times in found)
