"""A rank of an emulated cluster, under a real Trainer on one GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader

from lightning_dhellam import DHellamStrategy, LanguageModel
from lightning_dhellam.parallel import Cluster, Link, ParallelContext
from lightning_dhellam.parallel.collectives import all_gather, all_to_all, exchange
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.link import EmulatedLink, median_seconds
from lightning_dhellam.plan import Collective, Lane

pytestmark = pytest.mark.gpu

SHAPE = {
    "num_layers": 2,
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "vocab_size": 512,
    "max_sequence_length": 128,
}


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 512, (129,), generator=torch.Generator().manual_seed(index))
        return {"tokens": tokens[:-1], "labels": tokens[1:]}


@pytest.mark.parametrize("sms", [0, 4])
def test_a_link_is_busy_for_longer_when_more_crosses_it(sms: int, device: torch.device) -> None:
    link = EmulatedLink(Link(bandwidth=50e9, latency=20e-6, sms=sms), device)
    less, more = (link.calibration(size << 20) for size in (4, 64))
    assert less[0] == pytest.approx(20e-6 + (4 << 20) / 50e9)
    assert more[1] > 2 * less[1], "sixteen times the bytes"


def test_links_of_lanes_that_are_busy_together_do_not_wait_for_each_other(
    device: torch.device,
) -> None:
    link = Link(bandwidth=20e9, latency=0.0)
    one, other = (EmulatedLink(link, device, outward=outward) for outward in (False, True))
    beside = torch.cuda.Stream()

    def both() -> None:
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            other.carry(40 << 20)
        one.carry(40 << 20)
        torch.cuda.current_stream().wait_stream(beside)

    def alone() -> None:
        one.carry(40 << 20)

    assert median_seconds(both) < 1.4 * median_seconds(alone), "one after the other takes twice"


@pytest.mark.parametrize("sms", [0, 4])
def test_a_link_is_no_faster_than_asked_where_the_host_is_slow(
    sms: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own calibration must not take what the host needs for what the device needs."""
    event = torch.cuda.Event

    class Slow(event):  # type: ignore[misc, valid-type]
        def record(self, stream: torch.cuda.Stream | None = None) -> None:
            super().record(stream)
            time.sleep(0.1e-3)

    link = Link(bandwidth=100e9, sms=sms)
    monkeypatch.setattr(torch.cuda, "Event", Slow)
    made = EmulatedLink(link, device)
    monkeypatch.setattr(torch.cuda, "Event", event)
    for size in (16 << 20, 128 << 20):
        asked, taken = made.calibration(size)
        assert taken > 0.97 * asked, f"{asked * 1e6:.0f} µs asked, {taken * 1e6:.0f} µs taken"


def seconds(launch: Callable[[], Any]) -> float:
    return median_seconds(lambda: launch() and None, repeats=5)


@pytest.mark.parametrize("sms", [0, 4])
def test_what_goes_from_rank_to_rank_takes_its_time_both_ways_at_once(
    sms: int, device: torch.device
) -> None:
    """What is sent and what is received go at once; what a rank keeps takes no time."""
    other = (Collective.ALL_TO_ALL, Link(bandwidth=20e9, sms=sms))
    link = EmulatedLink(Link(bandwidth=40e9, sms=sms, collectives=(other,)), device, rank=1)
    group = ProcessGroup(1, 4)  # type: ignore[call-arg]
    on = Communicator(Lane.EP, group, link, 1, 4)
    x = torch.ones(64, 1 << 18, device=device, dtype=torch.bfloat16)
    row = x[0].nbytes
    given, taken = [1, 40, 20, 3], [30, 2, 30, 0]
    cases: dict[str, tuple[Callable[[], Any], float]] = {
        "exchange": (lambda: exchange(on, x, x[:8], target=2, source=0), 72 * row / 40e9),
        "deal": (lambda: all_to_all(on, x, given=given, taken=taken), 60 * row / 20e9),
        "gather": (lambda: all_gather(on, x), 3 * 64 * row / 40e9),
    }
    for name, (launch, asked) in cases.items():
        assert launch().work is None, "the stream orders it"
        assert launch().value is not None
        taken_seconds = seconds(launch)
        assert taken_seconds > 0.97 * asked, f"{name}: {taken_seconds} s for {asked}"
    for collective in Collective:
        assert link.processors(collective) == sms


def test_who_waits_for_an_emulated_group_waits_on_the_device(
    device: torch.device,
) -> None:
    """As for NCCL: a reduction on the data lane is waited for by the stream that is current."""
    Cluster(world_size=2, links={}).join()
    try:
        links = {"dp": Link(bandwidth=1e9, latency=0.0)}
        cluster = Cluster(world_size=2, links=links)
        context = ParallelContext.create(device, cluster=cluster)
        x, lane = torch.ones(50 << 18, device=device), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(lane):
            work = dist.all_reduce(x, group=context.groups.dp_cp, async_op=True)
        done = torch.cuda.Event()
        assert work is not None and not work.is_completed()
        assert torch.cuda.current_stream().query(), "nothing waits yet"
        work.wait()
        done.record()
        assert not done.query(), "50 ms of link"
        done.synchronize()
        assert work.is_completed()
        context.destroy()
    finally:
        dist.destroy_process_group()


def test_a_rank_of_eight_trains_in_one_process_and_saves_nothing(tmp_path: Path) -> None:
    cluster = Cluster(world_size=8, links={"tp": Link(bandwidth=100e9)})
    strategy = DHellamStrategy(tensor_parallel_size=8, emulate=cluster)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        strategy=strategy,
        precision="bf16-mixed",
        max_steps=2,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        **options,
    )
    module = LanguageModel("llama-tiny", SHAPE)
    try:
        trainer.fit(module, DataLoader(Tokens(), batch_size=4))
        assert trainer.global_step == 2
        assert module.model.layers[0].mlp.linear_fc2.weight.shape == (256, 512 // 8)
        with pytest.raises(ValueError, match="emulated"):
            trainer.save_checkpoint(tmp_path / "run.ckpt")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
