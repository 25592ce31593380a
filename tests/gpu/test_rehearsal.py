"""Loading a kernel waits for the whole device, and a step of a pipeline must not: see `Rehearsals`.

One process plays a stage of two, whose transfers bring nothing. A kernel that runs for seconds
stands for a receive that waits; a step that has to load something ends after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lightning_dhellam.engine import Engine, make_lanes
from lightning_dhellam.engine.lanes import CYCLES
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Cluster, ParallelContext
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import add_main_grads, batch_of, pieces
from tests.gpu.test_engine import CONFIG

pytestmark = pytest.mark.gpu

DEEP = replace(CONFIG, num_layers=4, hidden_dropout=0.1, tie_embeddings=True)
SECONDS = 3


@pytest.fixture(params=[0, 1])
def context(request: pytest.FixtureRequest, device: torch.device) -> Iterator[ParallelContext]:
    Cluster(2, {}, rank=request.param).join()
    try:
        made = ParallelContext.create(device, pipeline_parallel_size=2)
        yield made
        made.destroy()
    finally:
        dist.destroy_process_group()


def _runs_beside_another_kernel(device: torch.device) -> torch.cuda.Event:
    torch.cuda.synchronize(device)
    end = torch.cuda.Event()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda._sleep(int(SECONDS * CYCLES))
        end.record()
    return end


@pytest.mark.parametrize("length", [96, 95])
def test_no_step_loads_a_kernel(context: ParallelContext, length: int) -> None:
    device = context.device
    model = CausalLM(DEEP, context, torch.bfloat16).to(device)
    add_main_grads(model)
    lowered = lower(model)
    lanes = make_lanes(device, processors=16)
    builder = BUILDERS["interleaved"]
    engine = Engine(lowered.layers, lanes, builder, lowered.logits, lowered.stage, model)

    def batch(samples: int, size: int = 2) -> list:
        rows = batch_of(replace(DEEP, max_sequence_length=length), samples, length)
        return pieces({n: t.to(device) for n, t in rows.items()}, size, context)

    waited = []
    for name, micro_batches in {"uneven": batch(5), "one": batch(2), "single": batch(3, 1)}.items():
        state = torch.cuda.get_rng_state(device)
        engine._rehearsals.before(("train", builder), micro_batches, engine._train_alone)
        assert torch.equal(state, torch.cuda.get_rng_state(device))
        other = _runs_beside_another_kernel(device)
        engine.train(micro_batches)
        if other.query():
            waited.append(name)
    torch.cuda.synchronize(device)
    assert waited == []
