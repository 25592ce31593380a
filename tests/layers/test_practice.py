"""Routings that are made up: all numbers of rows that kernels are chosen by occur on each rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lightning_dhellam.engine.executor import Executor
from lightning_dhellam.layers import lower, practice
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Cluster, ParallelContext
from tests.engine.harness import (
    CPU,
    LoadingLanes,
    add_main_grads,
    batch_of,
    engine_of,
    pieces,
)
from tests.models.mixtures import MIXTURES


def _sizes(tokens: int, each: int, experts: int, number: int) -> list[int]:
    chosen = practice.made_up(torch.zeros(tokens, each, dtype=torch.int64), experts, number)
    assert chosen.shape == (tokens, each) and chosen.dtype == torch.int64
    assert chosen.min() >= 0 and chosen.max() <= experts
    for row in chosen.tolist():
        taken = [expert for expert in row if expert < experts]
        assert len(set(taken)) == len(taken), "a token goes to different experts"
    return chosen.flatten().bincount(minlength=experts + 1).tolist()[:experts]


@pytest.mark.parametrize(("tokens", "each", "experts"), [(96, 2, 8), (50, 3, 7), (2, 1, 6)])
def test_even_halving_and_no_rows(tokens: int, each: int, experts: int) -> None:
    even, halving, none = (_sizes(tokens, each, experts, n) for n in range(practice.COUNT))
    assert sum(even) == tokens * each and max(even) - min(even) <= 1
    assert none == [0] * experts
    assert all(few <= most for few, most in zip(halving, even, strict=True)), "no more memory"
    most = max(1, tokens * each // experts)
    expected = [max(1, most >> expert % most.bit_length()) for expert in range(experts)]
    assert halving == [min(*pair) for pair in zip(expected, even, strict=True)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_rehearses_by_each_routing_and_nothing_is_left(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(MIXTURES["mixtral"], num_layers=4, aux_loss_coefficient=0.1)
    Cluster(2, {}, rank=rank).join()
    try:
        context = ParallelContext.create(CPU, pipeline_parallel_size=2)
        model = CausalLM(config, context)
        add_main_grads(model)
        engine = engine_of(lower(model), lanes=LoadingLanes())
        micro_batches = pieces(batch_of(config, 2, 16), 1, context)
        seen: dict[str, list[list[int]]] = {}
        issue = Executor._issue

        def noted(executor: Executor, entry: object, tape: object) -> None:
            operator = entry.operator  # type: ignore[attr-defined]
            if operator.name in ("experts.fc1", "experts.fc2.wgrad"):
                ends = tape["ends"].value  # type: ignore[index]
                sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
                seen.setdefault(operator.name, []).append(sizes)
            issue(executor, entry, tape)  # type: ignore[arg-type]

        monkeypatch.setattr(Executor, "_issue", noted)
        engine._rehearsals.before(("train",), micro_batches, engine._train_alone)
        for sizes in seen.values():
            kinds = [[8] * 4, [8, 4, 2, 1], [0] * 4]
            assert all(kind in sizes for kind in kinds) and len(sizes) == 3 * len(kinds[0])
        assert seen.keys() == {"experts.fc1", "experts.fc2.wgrad"}
        assert all(not p.main_grad.any() for p in model.parameters())
        engine._rehearsals.before(("train",), micro_batches, engine._train_alone)
        assert len(seen["experts.fc1"]) == 12, "once"
        context.destroy()
    finally:
        dist.destroy_process_group()
