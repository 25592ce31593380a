"""Cluster files, links, and a rank of a cluster that exists only in time, on the CPU."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_dhellam.callbacks import RunSummary, ThroughputMonitor
from lightning_dhellam.models import training_flops_per_token
from lightning_dhellam.parallel import Cluster, Link, ParallelContext
from lightning_dhellam.parallel.collectives import all_gather, all_to_all, exchange, reduce_scatter
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.link import EmulatedLink, Play
from lightning_dhellam.parallel.networks import Network, Networks
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.recipes import clusters
from lightning_dhellam.strategy import DHellamStrategy
from tests.strategy.runs import GLOBAL_BATCH, LENGTH, Model, Sequences, make_trainer

CPU = torch.device("cpu")
FAST = Link(bandwidth=1e12, latency=0.0)


@pytest.fixture
def alone() -> Iterator[None]:
    """No process group outlives a test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


Over = Callable[[EmulatedLink], Communicator]


@pytest.fixture
def over(alone: None) -> Over:
    """Rank 1 of 4, over a link."""
    Cluster(world_size=4, links={}, rank=1).join()
    group = dist.group.WORLD
    assert group is not None
    return lambda link: Communicator(Lane.EP, group, link, 1, 4)


@pytest.mark.parametrize(
    ("sizes", "group"),
    [
        ({"context_parallel_size": 8}, "dp_cp"),
        (
            {
                "tensor_parallel_size": 8,
                "expert_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
            },
            "expt_dp",
        ),
    ],
    ids=["sequences", "experts"],
)
def test_gradients_cross_the_link_without_data_parallelism(
    alone: None, sizes: dict[str, Any], group: str
) -> None:
    cluster = Cluster(8, {"dp": FAST, "ep": FAST, "cp": FAST})
    cluster.join()
    context = ParallelContext.create(CPU, cluster=cluster, **sizes)
    assert context.topology.dp_size == 1 and Lane.DP not in context.links
    link = getattr(context.groups, group).link
    assert isinstance(link, EmulatedLink) and link.link == FAST
    if context.topology.ep_size > 1:
        assert context.links[Lane.EP].link == FAST
    context.destroy()


@pytest.mark.parametrize("name", clusters.names())
def test_shipped_clusters_load_and_say_where_their_figures_come_from(name: str) -> None:
    cluster = Cluster.load(name)
    assert cluster.name == name and cluster.world_size == (64 if name.endswith("64") else 8)
    links = cluster.links_of(Topology(world_size=cluster.world_size, tp_size=8))
    assert 10e9 < links["tp"].bandwidth < 450e9, "bytes per second, one way"
    assert "data sheet" in cluster.source and "assumed" in cluster.source


@pytest.mark.parametrize("kind", ["a40", "a800", "h100", "h200", "h800"])
def test_of_five_kinds_a_node_and_a_cluster_ship(kind: str) -> None:
    node, cluster = Cluster.load(f"{kind}-node"), Cluster.load(f"{kind}-64")
    assert cluster.device is not None and kind.upper() in cluster.device.name
    links = cluster.links_of(Topology(world_size=64, tp_size=8))
    assert links["tp"].bandwidth == node.links["tp"].bandwidth, "one figure, in two files"


def test_links_follow_from_networks_by_level() -> None:
    """Eight groups of data-parallel ranks, one to a device, share what a node sends."""
    cluster = Cluster.load("a40-64")
    links = cluster.links_of(Topology(world_size=64, tp_size=8))
    assert links["tp"].bandwidth == 22e9 and links["dp"].bandwidth == 11.2e9 / 8
    assert set(links) == {"tp", "dp"}
    wide = cluster.links_of(Topology(world_size=64, tp_size=2, cp_size=32))
    assert wide["cp"].bandwidth == wide["dp"].bandwidth == 11.2e9 * 4 / 8, "two rings a node"
    spread = cluster.links_of(Topology(world_size=64, ep_size=16))["ep"]
    assert spread.bandwidth == 11.2e9, "one ring, which enters each node once"
    assert spread.of(Collective.ALL_TO_ALL).bandwidth == pytest.approx(15 / 8 * 11.2e9 / 8)


@pytest.mark.parametrize("adapters", [1, 4, 8])
def test_devices_of_a_node_share_its_adapters(adapters: int) -> None:
    """A group that has all devices of a node has all of its adapters, and one rank its share."""
    a40 = Cluster.load("a40-64")
    assert a40.networks is not None
    networks = replace(a40.networks, adapters=adapters, inside=Network(1e12))
    cluster = replace(a40, networks=networks)
    links = cluster.links_of(Topology(world_size=64, tp_size=8))
    assert links["dp"].bandwidth == pytest.approx(adapters * 11.2e9 / 8)
    spread = cluster.links_of(Topology(world_size=64, ep_size=64))["ep"]
    assert spread.bandwidth == pytest.approx(adapters * 11.2e9)
    straight = spread.of(Collective.ALL_TO_ALL).bandwidth
    assert straight == pytest.approx(63 / 56 * adapters * 11.2e9 / 8)


def test_networks_take_as_much_longer_as_they_may_be_wrong() -> None:
    networks = Networks(8, Network(10.0, 2.0, 1.0, error=0.25), Network(4.0, error=0.0))
    for sign, times in ((1, 1.25), (-1, 0.75)):
        found = networks.wrong(sign)
        assert found.inside == replace(
            networks.inside, bandwidth=10 / times, latency=2 * times, hop=times
        )
        assert found.between == networks.between


def test_a_network_between_nodes_that_is_needed_is_named() -> None:
    cluster = replace(Cluster.load("a40-64"), networks=Networks(8, Network(1e9)))
    with pytest.raises(ValueError, match="16 ranks, of which a node of 8 holds 8, need a network"):
        cluster.links_of(Topology(world_size=64, tp_size=16))


def test_an_unknown_cluster_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"emulate='h20-node'.*did you mean 'h200-node'\?"):
        Cluster.load("h20-node")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("world_size: 8\nlinks: {tp: {bandwidth: 1, speed: 2}}", "unknown field 'speed'"),
        ("world_size: 8\nlinks: {xp: {bandwidth: 1}}", "'xp' is not one of tp, pp, cp, ep, dp"),
        ("links: {}", "world_size"),
        ("world_size: 8\nrank: 8\nlinks: {}", "rank=8 must be below world_size=8"),
        ("world_size: 8\nlinks: {tp: {bandwidth: 0}}", "bandwidth=0 must be more than 0"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping with world_size and links, not None"),
        ("world_size: 8\nlinks: {", "not YAML: .*line 2"),
        ("world_size: many\nlinks: {}", "world_size='many' must be a number"),
        ("world_size: 8.5\nlinks: {}", "world_size=8.5 must be a whole number"),
        ("world_size: true\nlinks: {}", "world_size=True must be a number"),
        ("world_size: 8\nlinks:", "links=None must be a mapping from lane to link"),
        ("world_size: 8", "has no links"),
        ("world_size: 8\nlinks: {tp: 370e9}", "links.tp must be a mapping with bandwidth"),
        ("world_size: 8\nlinks: {tp: {sms: 3}}", "links.tp has no bandwidth"),
        (
            "world_size: 8\nlinks: {tp: {bandwidth: fast}}",
            "links.tp.bandwidth='fast' must be a num",
        ),
        ("world_size: 8\nlinks: {tp: {bandwidth: }}", "links.tp.bandwidth=None must be a number"),
        ("world_size: 8\nlinks: {cp: {bandwidth: .nan}}", "links.cp.bandwidth=nan must be more"),
        ("world_size: 8\nlinks: {ep: {bandwidth: 1, latency: -1e-5}}", "links.ep.latency=-1e-05"),
        ("world_size: 8\nlinks: {tp: {bandwidth: 1, sms: .inf}}", "sms=inf must be a whole"),
        (
            "world_size: 8\nlinks: {ep: {bandwidth: 1, collectives: {gather: {sms: 1}}}}",
            "links.ep.collectives: 'gather' is not one of all_gather, ",
        ),
        (
            "world_size: 8\nlinks: {ep: {bandwidth: 1, collectives: {exchange: {sms: -1}}}}",
            "links.ep.collectives.exchange.sms=-1 must be at least 0",
        ),
        (
            "world_size: 8\nnetworks: {node: 8, adapters: 0, inside: {bandwidth: 1}}",
            "networks.adapters=0 must be more than 0",
        ),
        (
            "world_size: 8\nnetworks: {node: 8, inside: {bandwidth: 1, error: 1.5}}",
            "networks.inside.error=1.5 must be at least 0 and less than 1",
        ),
    ],
)
def test_a_broken_cluster_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Cluster.load(file)


def test_a_missing_cluster_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: No such file"):
        Cluster.load(tmp_path / "none.yaml")


def test_a_cluster_has_a_link_on_each_lane_and_for_each_collective(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "world_size: 16\n"
        "links:\n"
        "  tp: {bandwidth: 370e9, latency: 1e-5, sms: 16}\n"
        "  ep: {bandwidth: 227e9, sms: 24, collectives: {all_to_all: {bandwidth: 249e9, sms: 8}}}\n"
        "  dp: {bandwidth: 5.0e+10}\n"
    )
    cluster = Cluster.load(file)
    assert cluster.links["tp"] == Link(370e9, 1e-5, 16), "as people write numbers, and not YAML 1.1"
    ep = cluster.links["ep"]
    assert ep.of(Collective.ALL_GATHER) is ep and (ep.bandwidth, ep.sms) == (227e9, 24)
    assert ep.of(Collective.ALL_TO_ALL) == Link(249e9, ep.latency, 8)
    assert ep.slower(2).of(Collective.ALL_TO_ALL).bandwidth == 249e9 / 2
    assert str(cluster) == (
        f"{file}: rank 0 of 16, tp 370 GB/s on 16 SMs, ep 227 GB/s on 24 SMs,"
        " all_to_all 249 GB/s on 8 SMs, dp 50 GB/s by copy engine"
    )
    assert repr(cluster.links["tp"]) == "Link(bandwidth=370000000000.0, latency=1e-05, sms=16)"


def test_transfers_queue_behind_each_other_on_a_cpu(over: Over) -> None:
    link = EmulatedLink(Link(bandwidth=1e6, latency=0.0), CPU)
    x = torch.ones(1000)
    begun = time.perf_counter()
    works = [all_gather(over(link), x).work for _ in range(2)]
    for work in works:
        assert work is not None and work.wait()
        assert work.is_completed()
    first, second = (work._moment for work in works)  # type: ignore[union-attr]
    assert first - begun >= 3 * 4000 / 1e6
    assert second - first == pytest.approx(3 * 4000 / 1e6), "three quarters of 16 kB come over it"


def test_an_echo_brings_what_equal_ranks_would(over: Over) -> None:
    link = EmulatedLink(FAST, CPU)
    link.play = Play.ECHO
    x = torch.arange(8.0).view(8, 1)
    assert torch.equal(all_gather(over(link), x).value, x.repeat(4, 1))
    assert torch.equal(reduce_scatter(over(link), x).value, 4 * x[:2])


def test_an_echo_of_what_goes_from_rank_to_rank(over: Over) -> None:
    link = EmulatedLink(FAST, CPU, rank=1)
    link.play = Play.ECHO
    x = torch.arange(6.0).view(6, 1)
    assert torch.equal(exchange(over(link), x, target=2, source=0).value, x)
    assert len(exchange(over(link), x, target=2, source=0, rows=[8]).value) == 8
    pending = all_to_all(over(link), x, given=[1, 2, 0, 3], taken=[2, 2, 2, 3])
    assert pending.value[:, 0].tolist() == [1, 2, 1, 2, 1, 2, 1, 2, 1], "each rank's rows for this"
    pending = all_to_all(over(link), x, given=[3, 0, 0, 3], taken=[1, 0, 0, 0])
    assert pending.value.tolist() == [[0]]


def crossings(link: EmulatedLink) -> list[int]:
    """What `link` plays from now on, in bytes."""
    played: list[int] = []
    for sms in {link.processors(collective) for collective in Collective}:
        link._players[sms] = lambda crossing, seconds: played.append(crossing)
    return played


def test_what_crosses_the_link_is_what_other_ranks_send_or_get(over: Over) -> None:
    link = EmulatedLink(FAST, CPU, rank=1)
    on, played = over(link), crossings(link)
    x = torch.ones(8, 5)
    row = 5 * 4
    all_gather(on, x)
    reduce_scatter(on, x)
    exchange(on, x, x[:2].bfloat16(), target=2, source=0)
    exchange(on, x, target=2, source=0, rows=[9])
    all_to_all(on, x, given=[2, 2, 2, 2], taken=[2, 2, 2, 2])
    all_to_all(on, x, x[:, 0], given=[0, 8, 0, 0], taken=[5, 8, 0, 1])
    all_to_all(on, x, given=[1, 0, 0, 7], taken=[0, 9, 0, 0])
    all_to_all(on, x[:0], given=[0, 0, 0, 0], taken=[0, 0, 0, 0])
    assert played == [
        3 * 8 * row,
        6 * row,
        8 * row + 2 * row // 2,
        9 * row,
        6 * row,
        6 * row + 6 * 4,
        8 * row,
        0,
    ]


def test_a_collective_takes_what_its_own_link_says(over: Over) -> None:
    # So slow that the second one waits for the first, however late this process issues it.
    other = (Collective.ALL_TO_ALL, Link(200.0, latency=0.0, sms=3))
    link = EmulatedLink(Link(100.0, latency=0.0, collectives=(other,)), CPU, rank=1)
    x = torch.ones(4, 250)
    gather = all_gather(over(link), x).work
    dealt = all_to_all(over(link), x, given=[1] * 4, taken=[1] * 4).work
    assert gather is not None and dealt is not None
    between = dealt._moment - gather._moment  # type: ignore[attr-defined]
    assert between == pytest.approx(3000 / 200.0)
    assert over(link).processors(Collective.ALL_TO_ALL) == 3
    assert over(link).processors(Collective.EXCHANGE) == 0


def test_what_arrives_may_be_an_index(over: Over) -> None:
    link = EmulatedLink(FAST, CPU, rank=1)
    given = torch.full((8, 2), 100), torch.ones(8, dtype=torch.float8_e4m3fn)
    indices, small = exchange(over(link), *given, target=2, source=0).value
    assert not indices.any() and small.float().isfinite().all()


@pytest.mark.parametrize("play", Play)
def test_counts_of_all_ranks_are_those_of_this_one(over: Over, play: Play) -> None:
    link = EmulatedLink(FAST, CPU, rank=1)
    link.play = play
    for counts in ([[1, 2]], [[3, 4]]):
        gathered = all_gather(over(link), torch.tensor(counts)).value
        assert gathered.tolist() == counts * 4


@pytest.mark.parametrize("play", Play)
def test_rows_for_experts_are_those_of_this_rank(play: Play) -> None:
    link = EmulatedLink(FAST, CPU, rank=1)
    link.play = play
    sent, out = torch.arange(6.0).view(6, 1), torch.full((5, 1), torch.nan)
    work = link.all_to_all([sent], [out], given=[1, 2, 3], taken=[2, 0, 3])
    assert out.flatten().tolist() == [1, 2, 1, 2, 1], "rows 1 and 2 are for itself"
    assert (work is None) is (play is not Play.TIME)


def test_a_link_that_brings_nothing_takes_no_time(over: Over) -> None:
    link = EmulatedLink(Link(bandwidth=1.0), CPU)
    link.play = Play.NOTHING
    pending = all_gather(over(link), torch.ones(10))
    assert pending.work is None
    assert pending.value.isfinite().all(), "filled once, or GEMMs would be faster than real ones"


def test_what_arrives_is_made_up_once_and_again_when_memory_was_given_back() -> None:
    link = EmulatedLink(FAST, CPU)
    link.play = Play.NOTHING
    x, out = torch.ones(2), torch.zeros(8)
    link.all_gather(x, out)
    assert out.all()
    link.all_gather(x, out.zero_())
    assert not out.any(), "it takes no time"
    link.refill()
    link.all_gather(x, out)
    assert out.all()


def test_the_calibration_says_what_was_asked_and_taken() -> None:
    link = EmulatedLink(Link(bandwidth=1e9, latency=0.0), CPU)
    asked, taken = link.calibration(1_000_000)
    assert asked == pytest.approx(1e-3) and taken >= asked
    assert "1 MiB 1049 µs asked" in link.calibrated((1 << 20,))


def test_a_link_can_become_another() -> None:
    link = EmulatedLink(FAST, CPU)
    link.become(Link(bandwidth=2e6, latency=0.5))
    assert link.link is not None and link.link.seconds(1_000_000) == 1.0


def test_a_rank_of_eight_trains_marked_and_saves_no_checkpoint(
    alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    cluster = Cluster(world_size=8, links={"tp": FAST}, name="mine")
    strategy = DHellamStrategy(tensor_parallel_size=4, micro_batch_size=2, emulate=cluster)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        callbacks=[RunSummary(), ThroughputMonitor(peak_tflops=1e-6)],
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model(num_query_groups=4)
    with caplog.at_level("INFO"):
        trainer.fit(model, DataLoader(Sequences(), batch_size=GLOBAL_BATCH))  # type: ignore[arg-type]
    assert trainer.global_step == 2
    assert model.model.layers[0].mlp.linear_fc2.weight.shape == (16, 32 // 4)
    assert "EMULATED mine: rank 0 of 8, tp 1000 GB/s by copy engine" in caplog.text
    assert "link tp: 1000 GB/s by copy engine: 1 MiB" in caplog.text
    assert "EMULATED    mine" in capsys.readouterr().out
    (logged,) = tmp_path.rglob("hparams.yaml")
    assert "emulated: 'mine: rank 0 of 8" in logged.read_text()
    (file,) = tmp_path.rglob("metrics.csv")
    *_, metrics = csv.DictReader(file.open())
    assert float(metrics["emulated"]) == 1.0
    flops = training_flops_per_token(model.model_config, LENGTH)
    share = float(metrics["tokens_per_second"]) * flops / 8 / 1e6
    assert float(metrics["mfu"]) == pytest.approx(share, rel=1e-4), "of one device of eight"
    with pytest.raises(ValueError, match="emulated"):
        strategy.save_checkpoint({"state_dict": {}}, tmp_path / "run.ckpt")
    assert not (tmp_path / "run.ckpt").exists()


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert_parallel_size": 4},
        {
            "tensor_parallel_size": 2,
            "expert_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
        },
        {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    ],
    ids=["data", "whole", "split"],
)
def test_a_rank_trains_the_tokens_of_others(alone: None, sizes: dict[str, int]) -> None:
    links = {"tp": FAST, "ep": FAST, "dp": FAST}
    strategy = {**sizes, "micro_batch_size": 2, "emulate": Cluster(8, links)}
    trainer = make_trainer(strategy, max_steps=2)
    experts = {"num_experts": 4, "expert_ffn_hidden_size": 24}
    trainer.fit(Model(**experts), DataLoader(Sequences(), batch_size=4))  # type: ignore[arg-type]
    assert trainer.global_step == 2


def test_emulation_is_one_process() -> None:
    with pytest.raises(ValueError, match="devices x num_nodes is 2"):
        Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DHellamStrategy(emulate="h200-node"),
            logger=False,
        )
