"""IndexedDataModule: batches from a prepared or Megatron-LM dataset, for a Lightning Trainer."""

from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader, SequentialSampler, Subset, default_collate

from lightning_dhellam.data.indexed import build_splits, count_samples, open_indexed
from lightning_dhellam.data.loader import ResumableDataLoader, SkippingBatchSampler
from lightning_dhellam.data.tokenizer import Tokenizer

TokenBatch = dict[str, torch.Tensor]
_KEYS = ("tokens", "labels", "loss_mask")


class IndexedDataModule(LightningDataModule):
    """Batches of a language-modelling dataset, read by Megatron-core's GPTDataset.

    A batch is a dict of `tokens` and `labels`, int64 [B, S], and `loss_mask`, float32 [B, S], with
    B = batch_size, S = sequence_length; labels are the tokens one position later. Documents are
    joined, cut into samples and shuffled by `seed` alone, so every rank sees the same order; the
    Trainer's distributed sampler then deals the samples out to the data-parallel ranks. Every
    epoch goes through the samples in the same order. Training can go on in mid-epoch from a
    checkpoint.

    Args:
        path: Directory made by `dhellam data prepare`, or the prefix of a .bin and .idx pair made
            by Megatron-LM.
        sequence_length: Positions per sample, S.
        batch_size: Samples per data-parallel rank and optimizer step, B.
        split: Shares of the documents for training, validation and test. A share of 0 means none:
            then the validation loop is skipped.
        seed: Seed of the shuffle.
        num_workers: Processes per DataLoader that read ahead; 0 reads in the training process.
        train_samples: Samples in a training epoch. More than the data holds repeats it, shuffled
            anew each time. Left out, one pass over the training documents.
        tokenizer: The sentencepiece model of a Megatron-LM dataset.
        vocab_size: Number of token ids of a Megatron-LM dataset without a sentencepiece model.
        cache_dir: Where the index cache goes (shared by all ranks); by default beside the data.

    Raises ValueError, when it is constructed, for every argument that does not suit the data.
    """

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        batch_size: int,
        *,
        split: str = "98,1,1",
        seed: int = 1234,
        num_workers: int = 1,
        train_samples: int | None = None,
        tokenizer: str | Path | None = None,
        vocab_size: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        _at_least(1, sequence_length=sequence_length, batch_size=batch_size)
        _at_least(0, seed=seed, num_workers=num_workers)
        if train_samples is not None:
            _at_least(1, train_samples=train_samples)
        self.path = path
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.split = split
        self.seed = seed
        self.num_workers = num_workers
        self.train_samples = train_samples
        self._data = open_indexed(path, tokenizer, vocab_size, cache_dir)
        self._samples = count_samples(self._data, sequence_length, split, path)
        self._datasets: dict[Split, GPTDataset | Subset[TokenBatch]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of token ids: what the model's vocabulary must be, before any padding."""
        return self._data.vocabulary.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None for a dataset of which only the vocabulary size is known."""
        vocabulary = self._data.vocabulary
        return vocabulary if isinstance(vocabulary, Tokenizer) else None

    def setup(self, stage: str | None = None) -> None:
        """Build or read the index cache. Every rank must call this."""
        if self._datasets:
            return
        sizes = {Split.train: self.train_samples, Split.valid: None, Split.test: None}
        built = build_splits(self._data, self.sequence_length, self.split, self.seed, sizes)
        self._datasets = dict(built)
        if self.train_samples is not None and Split.train in built:
            # Megatron finishes the last pass; the user asked for a number.
            self._datasets[Split.train] = Subset(built[Split.train], range(self.train_samples))

    def train_dataloader(self) -> ResumableDataLoader[TokenBatch]:
        """Whole batches only, in Megatron's order."""
        dataset = self._dataset(Split.train, "training")
        self._check_one_batch(dataset)
        sampler = SkippingBatchSampler(
            SequentialSampler(dataset), batch_size=self.batch_size, drop_last=True
        )
        return ResumableDataLoader(
            dataset,
            batch_sampler=sampler,
            epoch_batches=self._epoch_batches,
            **self._loader_options(),
        )

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[DataLoader[TokenBatch]]:
        """The validation split; an empty list, which skips validation, if its share is 0."""
        if Split.valid not in self._samples:
            return []
        return self._evaluation_loader(Split.valid, "validation")

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        """The test split. Raises ValueError if its share is 0."""
        return self._evaluation_loader(Split.test, "test")

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        """The test split."""
        return self._evaluation_loader(Split.test, "test")

    def _evaluation_loader(self, part: Split, name: str) -> DataLoader[TokenBatch]:
        # The last batch may be smaller: a loss over a split should see all of it.
        return DataLoader(
            self._dataset(part, name),
            batch_size=self.batch_size,
            shuffle=False,
            **self._loader_options(),
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collate,
        }

    def _dataset(self, part: Split, name: str) -> GPTDataset | Subset[TokenBatch]:
        if part not in self._samples:
            raise ValueError(
                f"split={self.split!r} has no share for {name}."
                ' Give one, in the order training, validation, test, like "98,1,1".'
            )
        if not self._datasets:
            self.setup()
        return self._datasets[part]

    def _check_one_batch(self, dataset: Sized) -> None:
        replicas = 1
        if self.trainer is not None:
            replicas = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        if len(dataset) < self.batch_size * replicas:
            raise ValueError(
                f"path={self.path} has {len(dataset)} training sample(s) of"
                f" sequence_length={self.sequence_length}, but one step of batch_size="
                f"{self.batch_size} on {replicas} data-parallel rank(s) takes"
                f" {self.batch_size * replicas}. Give a smaller batch_size, train_samples to repeat"
                " the data, or more text."
            )

    def _epoch_batches(self) -> int | float:
        return self.trainer.num_training_batches if self.trainer is not None else float("inf")


def collate(samples: list[TokenBatch]) -> TokenBatch:
    """Stack what training reads; positions are implied."""
    return default_collate([{key: sample[key] for key in _KEYS} for sample in samples])


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name}={value} is too small. Give {name}={least} or more.")
