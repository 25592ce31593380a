"""A group of ranks that do not exist: its collectives copy nothing, and cost what the link says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dhellam.parallel import Cluster, Link, ParallelContext
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.link import EmulatedLink, Play
from lightning_dhellam.parallel.stand_in import BACKEND, Done, EmulatedGroup, is_emulated
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.versions import all_gather_single, reduce_scatter_single
from tests.models.llama import SMALL

CPU = torch.device("cpu")
ROWS, WIDTH = 8, 5
ROW = 4 * WIDTH
SLOW = Link(bandwidth=1.0, latency=0.0)
"""Takes minutes, so that no machine is too slow to find a transfer on its way."""


class Bytes(TorchDispatchMode):
    """Counts what operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.view.default:
            self.written += result.nbytes if isinstance(result, Tensor) else 0
        return result


@pytest.fixture
def rank_1_of_4() -> Iterator[None]:
    Cluster(world_size=4, links={}, rank=1).join()
    yield
    dist.destroy_process_group()


x, whole, part = torch.ones(ROWS, WIDTH), torch.ones(4 * ROWS, WIDTH), torch.ones(2, WIDTH)
COLLECTIVES: dict[str, tuple[Callable[[], Any], int]] = {
    "all_reduce": (lambda: dist.all_reduce(x), 2 * 6 * ROW),
    "all_reduce-max": (lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX), 2 * 6 * ROW),
    "broadcast": (lambda: dist.broadcast(x, 0), 8 * ROW),
    "gather": (lambda: all_gather_single(whole, x), 24 * ROW),
    "gather-list": (lambda: dist.all_gather(list(whole.split(ROWS)), x), 24 * ROW),
    "scatter": (lambda: reduce_scatter_single(part, x), 6 * ROW),
    "scatter-list": (lambda: dist.reduce_scatter(part, list(x.split(2))), 6 * ROW),
    "deal": (lambda: dist.all_to_all_single(torch.ones_like(x), x), 6 * ROW),
    "deal-uneven": (
        lambda: dist.all_to_all_single(part, x, [0, 2, 0, 0], [5, 1, 1, 1]),
        7 * ROW,
    ),
    "deal-nothing": (
        lambda: dist.all_to_all_single(part[:0], x, [0, 0, 0, 0], [0, 8, 0, 0]),
        0,
    ),
    "deal-list": (lambda: dist.all_to_all(list(x.split(2)), list(x.split(2))), 6 * ROW),
    "send": (lambda: dist.send(x, 2), 8 * ROW),
    "receive": (lambda: dist.recv(x, 0), 8 * ROW),
    "barrier": (dist.barrier, 0),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_writes_nothing_and_takes_what_the_link_says(
    name: str, rank_1_of_4: None
) -> None:
    launch, crossing = COLLECTIVES[name]
    assert is_emulated() and dist.get_backend() == BACKEND
    group = dist.group.WORLD
    assert isinstance(group, EmulatedGroup)
    launch()  # without a link, and once more with one
    played: list[int] = []

    class Counted(EmulatedLink):
        def carry(self, crossing: int) -> dist.Work:
            played.append(crossing)
            return super().carry(crossing)

    group.link = Counted(Link(bandwidth=1e12, latency=0.0), CPU)
    kept = whole.clone()
    with Bytes() as counted:
        launch()
    made = torch.ones_like(x).nbytes if name == "deal" else 0
    assert counted.written == made, "a copy that no cluster makes"
    assert torch.equal(whole, kept)
    assert sum(played) == crossing


def test_several_collectives_as_one(rank_1_of_4: None) -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    group = dist.group.WORLD
    assert isinstance(group, EmulatedGroup)
    for launch in (
        lambda: dist.all_reduce(x),
        lambda: all_gather_single(whole, x),
        lambda: reduce_scatter_single(part, x),
    ):
        with Bytes() as counted, _coalescing_manager(group, async_ops=True) as several:
            launch()
            launch()
        several.wait()
        assert counted.written == 0


def test_megatrons_reductions_go_over_the_link_of_their_lane(rank_1_of_4: None) -> None:
    links = {"dp": SLOW, "tp": Link(bandwidth=2e6, latency=0.0)}
    cluster = Cluster(world_size=4, links=links, rank=1)
    context = ParallelContext.create(CPU, tensor_parallel_size=2, cluster=cluster)
    assert {lane: link.link for lane, link in context.links.items()} == {
        Lane.TP: links["tp"],
        Lane.DP: SLOW,
    }
    data = context.links[Lane.DP]
    moments = []
    for group in (context.groups.dp, context.groups.dp_cp):
        work = dist.all_reduce(x, group=group, async_op=True)
        assert work is not None and not work.is_completed()
        moments.append(work._moment)  # type: ignore[attr-defined]
    assert moments[1] - moments[0] == pytest.approx(ROWS * ROW), "one behind the other"
    data.play = Play.NOTHING
    work = dist.all_reduce(x, group=context.groups.dp, async_op=True)
    assert work is not None and work.is_completed()
    context.destroy()


def test_a_step_of_gradients_crosses_the_data_lane_once(rank_1_of_4: None) -> None:
    cluster = Cluster(world_size=4, links={"dp": Link(bandwidth=1e12, latency=0.0)}, rank=1)
    context = ParallelContext.create(CPU, cluster=cluster)
    played: list[int] = []
    context.links[Lane.DP]._players[0] = lambda crossing, seconds: played.append(crossing) or Done()  # type: ignore[func-returns-value]
    with context.megatron():
        model = torch.nn.Linear(16, 12, bias=False)
    config = SMALL.transformer_config(context, torch.float32)
    buffers = GradientBuffers(model, config, context, sharded=True, fp32=True)
    played.clear()
    buffers.zero()
    buffers.ready((model.weight,), context.megatron)
    buffers.finish()
    (buffer,) = buffers.ddp.buffers
    assert sum(played) == buffer.grad_data.nbytes * 3 // 4, "its part comes back, the rest leaves"
    buffers.close()
    context.destroy()


def test_lanes_without_a_link_take_no_time(rank_1_of_4: None) -> None:
    context = ParallelContext.create(
        CPU, tensor_parallel_size=4, cluster=Cluster(world_size=4, links={}, rank=1)
    )
    transport = context.communicators[Lane.TP].transport
    assert isinstance(transport, EmulatedLink) and transport.link is None
    assert not context.links and transport.processors(Collective.ALL_GATHER) == 0
    assert transport.all_gather(x, whole.clone()) is None
    context.destroy()
