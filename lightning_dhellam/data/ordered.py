"""Data modules whose training samples are in one order, and are resumed by their place in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_dhellam.data.loader import ResumableDataLoader, SampleOrder, position_in

TokenBatch = dict[str, torch.Tensor]


class OrderedDataModule(LightningDataModule):
    """Batches of an order of samples that all data-parallel ranks share.

    A checkpoint holds how many samples were seen, and what decides which is where.

    Attributes:
        path: where the samples are from, in messages.
        sequence_length: positions per sample.
        batch_size: samples per data-parallel rank and optimizer step.
        seed: of the order.
        num_workers: processes that read ahead.
        train_samples: samples of an epoch; None for as many as there are.
    """

    path: Any
    sequence_length: int
    batch_size: int
    seed: int
    num_workers: int
    train_samples: int | None

    def __init__(self) -> None:
        super().__init__()
        self._order: SampleOrder | None = None
        self._saved: Mapping[str, Any] = {}

    def _training_loader(self, dataset: Any) -> ResumableDataLoader[TokenBatch]:
        """Whole batches only, from where a checkpoint that was loaded has ended."""
        order = self._order = self._make_order(dataset)
        self._check_one_batch(order)
        order.position = position_in(self._saved, order.step_samples)
        self._saved = {}
        return ResumableDataLoader(dataset, order, **self._loader_options())

    def _make_order(self, dataset: Any) -> SampleOrder:
        replicas, rank = self._place()
        return SampleOrder(
            dataset,
            self.batch_size,
            self.seed,
            replicas=replicas,
            rank=rank,
            epoch_samples=self.train_samples,
        )

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[TokenBatch]:
        # The last batch may be smaller: a loss over a split should see all of it.
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=False, **self._loader_options()
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def state_dict(self) -> dict[str, Any]:
        """How many samples training has seen, and of which order."""
        seen = self._order.position if self._order is not None else 0
        return {"samples": seen, "order": self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the sample after the last one that was seen.

        Raises ValueError if these are other samples, or the same in another order.
        """
        for name, saved in state_dict.get("order", {}).items():
            if saved != self._identity.get(name):
                raise ValueError(
                    f"the checkpoint was trained on data with {name}={saved}, this run has"
                    f" {name}={self._identity.get(name)}: its samples have another order, so that"
                    " none of them is the next. Use the same, or start a new run from the weights"
                )
        self._saved = state_dict

    @property
    def _identity(self) -> dict[str, Any]:
        """What decides which sample is where in the order."""
        raise NotImplementedError

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


def at_least(least: int, **arguments: int) -> None:
    """Refuse arguments below `least`, by their names."""
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name}={value} is too small. Give {name}={least} or more.")
