"""Stages are connected where works send to each other, and for a tied weight where there is one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.pipeline.schedules import SCHEDULES, Placement, placement_of, scheme_of
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU
from tests.models.llama import SMALL
from tests.ranks import run_ranks

STAGES = 4
CONFIG = replace(SMALL, num_layers=2 * STAGES)


def _of_runs(rank: int) -> list[tuple[str, bool, bool]]:
    """Whether a run of each schedule has its edges, without a tied weight and with one."""
    found = []
    for name in SCHEDULES:
        placement = placement_of(name, STAGES)
        works, _ = scheme_of(name, STAGES)(STAGES, STAGES).messages()
        for tied, expected in ((False, {*works}), (True, {*works, *placement.loop})):
            config = replace(CONFIG, tie_embeddings=tied)
            with Runner.create(
                config, "cpu", pipeline_parallel_size=STAGES, schedule=name
            ) as runner:
                found.append((name, tied, {*runner.context.edges} == expected))
    return found


def test_a_run_connects_the_stages_that_its_works_need() -> None:
    for found in run_ranks(STAGES, _of_runs, timeout=300):
        assert len(found) == 2 * len(SCHEDULES) and all(right for *_, right in found), found


def _refused(rank: int) -> str:
    context: Any = ParallelContext.create(
        CPU, pipeline_parallel_size=3, placement=Placement.straight(3), tied=False
    )
    model = CausalLM(replace(CONFIG, tie_embeddings=True), context)
    with pytest.raises(ValueError) as refused:
        lower(model, scheme=SCHEDULES["1f1b"])
    context.destroy()
    return str(refused.value)


def test_a_model_that_ties_more_than_was_said_is_refused() -> None:
    for said in run_ranks(3, _refused):
        assert "tie_embeddings=True" in said and "tie_embeddings=False" in said
