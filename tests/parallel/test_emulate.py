"""Cluster files, links, and a rank of a cluster that exists only in time, on the CPU."""

from __future__ import annotations

import csv
from collections.abc import Iterator
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
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.parallel.collectives import all_gather, reduce_scatter
from lightning_dhellam.parallel.link import EmulatedLink, Play
from lightning_dhellam.recipes import clusters
from lightning_dhellam.strategy import DHellamStrategy
from tests.strategy.runs import GLOBAL_BATCH, LENGTH, Model, Sequences

CPU = torch.device("cpu")
FAST = Link(bandwidth=1e12, latency=0.0)


@pytest.fixture
def alone() -> Iterator[None]:
    """No process group outlives a test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def group(alone: None) -> Any:
    """Rank 1 of 4."""
    Cluster(world_size=4, links={}, rank=1).join()
    return dist.group.WORLD


@pytest.mark.parametrize("name", clusters.names())
def test_shipped_clusters_load_and_say_where_their_figures_come_from(name: str) -> None:
    cluster = Cluster.load(name)
    assert cluster.name == name and cluster.world_size == 8
    assert 10e9 < cluster.links["tp"].bandwidth < 450e9, "bytes per second, one way"
    assert "data sheet" in cluster.source and "assumed" in cluster.source


def test_five_kinds_of_nodes_ship() -> None:
    kinds = {"a40-node", "a800-node", "h100-node", "h200-node", "h800-node"}
    assert kinds <= set(clusters.names())


def test_an_unknown_cluster_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"emulate='h20-node'.*did you mean 'h200-node'\?"):
        Cluster.load("h20-node")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("world_size: 8\nlinks: {tp: {bandwidth: 1, speed: 2}}", "unknown field 'speed'"),
        ("world_size: 8\nlinks: {pp: {bandwidth: 1}}", "'pp' is not one of tp"),
        ("links: {}", "world_size"),
        ("world_size: 8\nrank: 8\nlinks: {}", "rank=8 must be below world_size=8"),
        ("world_size: 8\nlinks: {tp: {bandwidth: 0}}", "bandwidth=0 must be more than 0"),
        ("- 1", "must be a mapping"),
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


def test_transfers_queue_behind_each_other_on_a_cpu(group: Any) -> None:
    link = EmulatedLink(Link(bandwidth=1e6, latency=0.0), CPU)
    x = torch.ones(1000)
    works = [all_gather(x, group, link).work for _ in range(2)]
    assert all(work is not None and not work.is_completed() for work in works)
    for work in works:
        assert work is not None and work.wait()
        assert work.is_completed()
    first, second = (work._moment for work in works)  # type: ignore[union-attr]
    assert second - first == pytest.approx(3 * 4000 / 1e6), "three quarters of 16 kB come over it"


def test_an_echo_brings_what_equal_ranks_would(group: Any) -> None:
    link = EmulatedLink(FAST, CPU)
    link.play = Play.ECHO
    x = torch.arange(8.0).view(8, 1)
    assert torch.equal(all_gather(x, group, link).value, x.repeat(4, 1))
    assert torch.equal(reduce_scatter(x, group, link).value, 4 * x[:2])


def test_a_link_that_brings_nothing_takes_no_time(group: Any) -> None:
    link = EmulatedLink(Link(bandwidth=1.0), CPU)
    link.play = Play.NOTHING
    pending = all_gather(torch.ones(10), group, link)
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
    assert link.link.seconds(1_000_000) == 1.0


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


def test_emulation_is_one_process() -> None:
    with pytest.raises(ValueError, match="devices x num_nodes is 2"):
        Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DHellamStrategy(emulate="h200-node"),
            logger=False,
        )
