"""Small training runs under real Lightning Trainers, on which the tests of the strategy stand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dhellam.data.loader import ResumableDataLoader, SampleOrder
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.strategy import DHellamStrategy

LENGTH, GLOBAL_BATCH = 8, 8
SHAPE = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=32,
    max_sequence_length=16,
    init_std=0.2,
)


class Sequences(Dataset[dict[str, Tensor]]):
    """Rising token sequences, so that there is something to learn; each knows its index."""

    def __init__(self, samples: int = 64, length: int = LENGTH) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = (samples, length + 1)
        self.tokens = torch.randint(SHAPE.vocab_size, shape, generator=generator).sort().values

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.tokens[index]
        return {"tokens": row[:-1], "labels": row[1:], "index": torch.tensor(index)}


class Model(DualStrandMixin):
    """The smallest Llama with AdamW."""

    def __init__(self, learning_rate: float = 0.01, **changes: Any) -> None:
        super().__init__()
        self.model_config = replace(SHAPE, **changes)
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Losses(Callback):
    """Remembers the loss of every step as it was logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["train_loss"].item())


def join(rank: int, world: int) -> None:
    """Let Lightning take this process, made by `run_ranks`, for one that torchrun has started."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "tests",
    }


def make_trainer(
    strategy: dict[str, Any] | str | Strategy, callbacks: Sequence[Callback] = (), **options: Any
) -> Trainer:
    """A quiet Trainer on all ranks; a dict means DHellamStrategy with these arguments."""
    given: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", 1)),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    chosen = DHellamStrategy(**strategy) if isinstance(strategy, dict) else strategy
    return Trainer(strategy=chosen, callbacks=list(callbacks), **given)


def loader(strategy: dict[str, Any] | str, samples: int = 64) -> ResumableDataLoader[Any]:
    """Batches of this rank, in order: its share of a global batch of 8."""
    replicas, rank = _place(strategy)
    data = Sequences(samples)
    order = SampleOrder(data, GLOBAL_BATCH // replicas, replicas=replicas, rank=rank)
    return ResumableDataLoader(data, order)


def evaluation(strategy: dict[str, Any] | str, samples: int = 64) -> DataLoader[Any]:
    """The same batches for another loop than training, the last one perhaps smaller."""
    return DataLoader(Sequences(samples), GLOBAL_BATCH // _place(strategy)[0])


def _place(strategy: dict[str, Any] | str) -> tuple[int, int]:
    """How many data-parallel ranks there are, and which of them this process is."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if isinstance(strategy, str):
        return world, rank
    # Ranks with the same samples are neighbours, and pipeline stages are farthest apart.
    sharing = strategy.get("tensor_parallel_size", 1) * strategy.get("context_parallel_size", 1)
    replicas = world // sharing // strategy.get("pipeline_parallel_size", 1)
    return replicas, rank // sharing % replicas


def train(
    strategy: dict[str, Any] | str,
    module: LightningModule | None = None,
    *,
    samples: int = 64,
    **options: Any,
) -> list[float]:
    """Train for 4 steps; the mean loss of the global batch at each."""
    losses = Losses()
    options = {"max_steps": 4, **options}
    callbacks = [losses, *options.pop("callbacks", ())]
    trainer = make_trainer(strategy, callbacks, **options)
    trainer.fit(module or Model(), loader(strategy, samples))
    return losses.values


OF_TEXT = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "vocab_size": 270}
"""Fields of a small `LanguageModel` for what `words_of_a_run` prepares."""


def words_of_a_run(folder: Path) -> list[str]:
    """Options of `dhellam fit` and the like for a run on a few lines of text, made in `folder`."""
    from lightning_dhellam.data.prepare import prepare  # a second that ranks need not spend

    (folder / "source").mkdir()
    for number in range(20):
        (folder / "source" / f"{number}.txt").write_text("the quick brown fox\n" * 20)
    prepare(folder / "source", folder / "data", vocab_size=270, workers=1)
    return [
        "--model=lightning_dhellam.LanguageModel",
        "--data=lightning_dhellam.data.IndexedDataModule",
        "--data.sequence_length=16",
        "--data.batch_size=4",
        "--data.num_workers=0",
        "--trainer.strategy=dhellam",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        f"--data.path={folder / 'data'}",
        f"--trainer.default_root_dir={folder}",
    ]
