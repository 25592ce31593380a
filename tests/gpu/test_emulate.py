"""A rank of an emulated cluster, under a real Trainer on one GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_dhellam import DHellamStrategy, LanguageModel
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.parallel.link import EmulatedLink

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
