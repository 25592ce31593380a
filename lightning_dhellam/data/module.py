"""IndexedDataModule: batches from a prepared or Megatron-LM dataset, for a Lightning Trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from lightning_dhellam.data.indexed import (
    USUAL_SPLIT,
    build_splits,
    count_samples,
    open_indexed,
    parse_split,
    working_split,
)
from lightning_dhellam.data.loader import ResumableDataLoader, SampleOrder, position_in
from lightning_dhellam.data.packing import Packing, TokenBatch
from lightning_dhellam.data.tokenizer import Tokenizer
from lightning_dhellam.values import check_kinds


class IndexedDataModule(LightningDataModule):
    """Batches of a language-modelling dataset, read by Megatron-core's GPTDataset.

    A batch is a dict of `tokens` and `labels`, int64 [B, S], and `loss_mask`, float32 [B, S], with
    B = batch_size, S = sequence_length; labels are the tokens one position later. Documents are
    joined, cut into samples and shuffled by `seed` alone, so every rank sees the same order, of
    which the data-parallel ranks take turns. Each pass over the samples has an order of its own.
    A checkpoint holds how many samples were seen, so that training goes on with the next one, in
    mid-epoch as well, whatever the batch size and the number of ranks are then.

    Args:
        path: Directory made by `dhellam data prepare`, or the prefix of a .bin and .idx pair made
            by Megatron-LM.
        sequence_length: Positions per sample, S.
        batch_size: Samples per data-parallel rank and optimizer step, B.
        split: Shares of the documents for training, validation and test. A share of 0 means none:
            then the validation loop is skipped. Left out, "98,1,1", or as much for validation and
            test as a few documents need, if they can spare it.
        seed: Seed of the shuffle.
        num_workers: Processes per DataLoader that read ahead; 0 reads in the training process.
        train_samples: Samples in a training epoch: the next so many of an order that goes through
            the data again and again, pass by pass. Left out, as many as the data holds.
        tokenizer: The tokenizer of a Megatron-LM dataset: the file of one, or a folder with it.
        vocab_size: Number of token ids of a Megatron-LM dataset without a tokenizer.
        cache_dir: Where the index cache goes (shared by all ranks); by default beside the data.
        reset_position_ids: Begin positions at 0 in each document of a sample, and say them in
            `position_ids` [B, S].
        reset_attention_mask: Let no document of a sample attend to another.
        eod_mask_loss: Leave out of the loss what is predicted from a document's end: the first
            token of the next one.

    Raises ValueError, when it is constructed, for every argument that does not suit the data.
    """

    def __init__(
        self,
        path: str | Path,
        sequence_length: int,
        batch_size: int,
        *,
        split: str | None = None,
        seed: int = 1234,
        num_workers: int = 1,
        train_samples: int | None = None,
        tokenizer: str | Path | None = None,
        vocab_size: int | None = None,
        cache_dir: str | Path | None = None,
        reset_position_ids: bool = False,
        reset_attention_mask: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        check_kinds(IndexedDataModule.__init__, locals())
        super().__init__()
        _at_least(1, sequence_length=sequence_length, batch_size=batch_size)
        _at_least(0, seed=seed, num_workers=num_workers)
        if train_samples is not None:
            _at_least(1, train_samples=train_samples)
        self.path = path
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.train_samples = train_samples
        self._data = open_indexed(path, tokenizer, vocab_size, cache_dir)
        self._packing = Packing(reset_position_ids, reset_attention_mask, eod_mask_loss)
        self._packing.check(self._data, path)
        self.split = self._working_split() if split is None else split
        self._samples = count_samples(self._data, sequence_length, self.split, path)
        self._datasets: dict[Split, GPTDataset] = {}
        self._order: SampleOrder | None = None
        self._saved: Mapping[str, Any] = {}

    def _working_split(self) -> str:
        found = working_split(self._data, self.sequence_length, self.path)
        if found != USUAL_SPLIT:
            rank_zero_warn(
                f"path={self.path} has too few documents for split='{USUAL_SPLIT}', so"
                f" split='{found}' is used: give another one, more text, or cut long documents with"
                " `dhellam data prepare --max_document_tokens`"
            )
        return found

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
        packing = self._packing
        self._datasets = build_splits(
            self._data,
            self.sequence_length,
            self.split,
            self.seed,
            resets=packing.resets,
            eod_mask_loss=packing.eod_mask_loss,
        )

    def train_dataloader(self) -> ResumableDataLoader[TokenBatch]:
        """Whole batches only, from where a checkpoint that was loaded has ended."""
        dataset = self._dataset(Split.train, "training")
        replicas, rank = self._place()
        self._order = SampleOrder(
            dataset,
            self.batch_size,
            self.seed,
            replicas=replicas,
            rank=rank,
            epoch_samples=self.train_samples,
        )
        self._check_one_batch(self._order)
        self._order.position = position_in(self._saved, self._order.step_samples)
        self._saved = {}
        return ResumableDataLoader(dataset, self._order, **self._loader_options())

    def state_dict(self) -> dict[str, Any]:
        """How many samples training has seen, and of which order."""
        seen = self._order.position if self._order is not None else 0
        return {"samples": seen, "order": self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the sample after the last one that was seen.

        Raises ValueError if these are other samples, or the same in another order.
        """
        for name, saved in state_dict.get("order", {}).items():
            if saved != self._identity[name]:
                raise ValueError(
                    f"the checkpoint was trained on data with {name}={saved}, this run has"
                    f" {name}={self._identity[name]}: its samples have another order, so that none"
                    " of them is the next. Use the same, or start a new run from the weights"
                )
        self._saved = state_dict

    @property
    def _identity(self) -> dict[str, Any]:
        """What decides which sample is where in the order."""
        return {
            "path": f"{self._data.prefix.name} ({self._data.digest})",
            "split": ",".join(f"{share:g}" for share in parse_split(self.split)),
            "seed": self.seed,
            "sequence_length": self.sequence_length,
        }

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[DataLoader[TokenBatch]]:
        """The validation split; an empty list, which skips validation, if its share is 0."""
        if Split.valid not in self._samples:
            return []
        return self._evaluation_loader(Split.valid, "validation")

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        """The test split. Raises ValueError if its share is 0."""
        return self._evaluation_loader(Split.test, "test")

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        """Batches of the test split, as `test_dataloader` gives them."""
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
            "collate_fn": self._packing.collate,
        }

    def _dataset(self, part: Split, name: str) -> GPTDataset:
        if part not in self._samples:
            raise ValueError(
                f"split={self.split!r} has no share for {name}."
                ' Give one, in the order training, validation, test, like "98,1,1".'
            )
        if not self._datasets:
            self.setup()
        return self._datasets[part]

    def _place(self) -> tuple[int, int]:
        """How many data-parallel ranks there are, and which of them this process is."""
        dealt = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (dealt["num_replicas"], dealt["rank"]) if dealt else (1, 0)

    def _check_one_batch(self, order: SampleOrder) -> None:
        if not len(order):
            raise ValueError(
                f"path={self.path} has {order.epoch_samples} training sample(s) of"
                f" sequence_length={self.sequence_length}, but one step of batch_size="
                f"{self.batch_size} on {order.num_replicas} data-parallel rank(s) takes"
                f" {order.step_samples}. Give a smaller batch_size, train_samples to repeat"
                " the data, or more text."
            )


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name}={value} is too small. Give {name}={least} or more.")
