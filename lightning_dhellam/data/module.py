"""IndexedDataModule: batches from a prepared or Megatron-LM dataset, for a Lightning Trainer."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_dhellam.data.blend import BlendedOrder, as_weights, joined
from lightning_dhellam.data.indexed import (
    SPLITS,
    USUAL_SPLIT,
    build_splits,
    count_samples,
    open_indexed,
    parse_split,
    working_split,
)
from lightning_dhellam.data.loader import ResumableDataLoader, SampleOrder
from lightning_dhellam.data.ordered import OrderedDataModule, TokenBatch, at_least
from lightning_dhellam.data.packing import Packing
from lightning_dhellam.data.tokenizer import BareVocabulary, Tokenizer
from lightning_dhellam.values import check_kinds


class IndexedDataModule(OrderedDataModule):
    """Batches of a language-modelling dataset, read by Megatron-core's GPTDataset.

    A batch is a dict of `tokens` and `labels`, int64 [B, S], and `loss_mask`, float32 [B, S], with
    B = batch_size, S = sequence_length; labels are the tokens one position later. Documents are
    joined, cut into samples and shuffled by `seed` alone, so every rank sees the same order, of
    which the data-parallel ranks take turns. Each pass over the samples has an order of its own.
    A checkpoint holds how many samples were seen, so that training goes on with the next one, in
    mid-epoch as well, whatever the batch size and the number of ranks are then.

    Args:
        path: Directory made by `dhellam data prepare`, or the prefix of a .bin and .idx pair made
            by Megatron-LM; or several with their weights, `{path: weight}`, which must have the
            same tokenizer. Of training samples each set then has its share, up to any place in the
            order; a set that is through begins again. Evaluation has each sample of all sets once.
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
        path: dict[str, float] | str | Path,
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
        at_least(1, sequence_length=sequence_length, batch_size=batch_size)
        at_least(0, seed=seed, num_workers=num_workers)
        if train_samples is not None:
            at_least(1, train_samples=train_samples)
        self.path = path
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.train_samples = train_samples
        self._weights = as_weights(path)
        self._sets = {
            one: open_indexed(one, tokenizer, vocab_size, cache_dir) for one in self._weights
        }
        self._check_vocabularies()
        self._packing = Packing(reset_position_ids, reset_attention_mask, eod_mask_loss)
        for one, data in self._sets.items():
            self._packing.check(data, one)
        self.split = self._working_split() if split is None else split
        self._parts = {
            part
            for one, data in self._sets.items()
            for part in count_samples(data, sequence_length, self.split, one)
        }
        self._datasets: dict[Split, list[GPTDataset]] = {}

    def _working_split(self) -> str:
        splits = [working_split(data, self.sequence_length, p) for p, data in self._sets.items()]
        found = max(splits, key=SPLITS.index)
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
        return self._vocabulary.vocab_size

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None for a dataset of which only the vocabulary size is known."""
        return self._vocabulary if isinstance(self._vocabulary, Tokenizer) else None

    @property
    def _vocabulary(self) -> Tokenizer | BareVocabulary:
        return next(iter(self._sets.values())).vocabulary

    def _check_vocabularies(self) -> None:
        first, *others = self._sets
        for other in others:
            if (
                self._sets[other].vocabulary.unique_identifiers
                != self._vocabulary.unique_identifiers
            ):
                raise ValueError(
                    f"path has {first} and {other}, which were made with different tokenizers, so"
                    " that their token ids mean different things: prepare one of them again with"
                    " --tokenizer of the other"
                )

    def setup(self, stage: str | None = None) -> None:
        """Build or read the index cache. Every rank must call this."""
        if self._datasets:
            return
        packing = self._packing
        for data in self._sets.values():
            found = build_splits(
                data,
                self.sequence_length,
                self.split,
                self.seed,
                resets=packing.resets,
                eod_mask_loss=packing.eod_mask_loss,
            )
            for part, dataset in found.items():
                self._datasets.setdefault(part, []).append(dataset)

    def train_dataloader(self) -> ResumableDataLoader[TokenBatch]:
        """Whole batches only, from where a checkpoint that was loaded has ended."""
        return self._training_loader(self._dataset(Split.train, "training"))

    @override
    def _make_order(self, dataset: Any) -> SampleOrder:
        if len(self._sets) == 1:
            return super()._make_order(dataset)
        sets = self._datasets[Split.train]
        replicas, rank = self._place()
        order = BlendedOrder(
            sets,
            [*self._weights.values()],
            self.batch_size,
            self.seed,
            replicas=replicas,
            rank=rank,
            epoch_samples=self.train_samples,
        )
        passes = order.passes(order.epoch_samples)
        shares = ", ".join(
            f"{path} {share:.1%} ({len(one)} samples, {turns:.2f} passes)"
            for (path, share), one, turns in zip(self._weights.items(), sets, passes, strict=True)
        )
        rank_zero_info(f"an epoch of {order.epoch_samples} training samples has of {shares}")
        return order

    @property
    def _identity(self) -> dict[str, Any]:
        """What decides which sample is where in the order."""
        names = [f"{data.prefix.name} ({data.digest})" for data in self._sets.values()]
        shares = self._weights.values()
        return {
            "path": names[0] if len(names) == 1 else dict(zip(names, shares, strict=True)),
            "split": ",".join(f"{share:g}" for share in parse_split(self.split)),
            "seed": self.seed,
            "sequence_length": self.sequence_length,
        }

    def val_dataloader(self) -> DataLoader[TokenBatch] | list[DataLoader[TokenBatch]]:
        """The validation split; an empty list, which skips validation, if its share is 0."""
        if Split.valid not in self._parts:
            return []
        return self._evaluation_loader(self._dataset(Split.valid, "validation"))

    def test_dataloader(self) -> DataLoader[TokenBatch]:
        """The test split. Raises ValueError if its share is 0."""
        return self._evaluation_loader(self._dataset(Split.test, "test"))

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        """Batches of the test split, as `test_dataloader` gives them."""
        return self._evaluation_loader(self._dataset(Split.test, "test"))

    def _loader_options(self) -> dict[str, Any]:
        return super()._loader_options() | {"collate_fn": self._packing.collate}

    def _dataset(self, part: Split, name: str) -> Dataset[Any]:
        if part not in self._parts:
            raise ValueError(
                f"split={self.split!r} has no share for {name}."
                ' Give one, in the order training, validation, test, like "98,1,1".'
            )
        if not self._datasets:
            self.setup()
        return joined(self._datasets[part])
