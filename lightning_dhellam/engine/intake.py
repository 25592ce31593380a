"""What brings a rank's batches into the form that the engine takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine.batch import MicroBatch, cut
from lightning_dhellam.engine.documents import documents_of
from lightning_dhellam.engine.inputs import (
    Limits,
    check_batch,
    check_ids,
    pinned,
    unshifted,
)
from lightning_dhellam.engine.lengthen import lengthened
from lightning_dhellam.engine.unread import check_unread
from lightning_dhellam.engine.weights import Everyone
from lightning_dhellam.parallel import ParallelContext


@dataclass
class Intake:
    """Checks the batches of this rank, and cuts them into micro-batches.

    Attributes:
        limits: what the model takes.
        micro_batch_size: samples that go through the layers together.
        seed: of dropout.
        context: place and device of this rank.
    """

    limits: Limits
    micro_batch_size: int
    seed: int
    context: ParallelContext
    _has_begun: bool = field(default=False, init=False)
    _has_seen_labels: bool = field(default=False, init=False)

    def lengthened(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch of Hugging Face's, in our words, whose sequences may have any length.

        Padding is added at the end so that they divide over the ranks. With labels of one's own,
        of which it is not known what they are, the batch stays as it is, and so does any other.
        """
        if self.limits.own_labels or "input_ids" not in batch:
            return batch
        return lengthened(batch, self.limits.multiple)

    def micro_batches(
        self,
        batch: Mapping[str, Any],
        *,
        needs_labels: bool = True,
        step: int = 0,
        everyone: Everyone | None = None,
        scale: Tensor | None = None,
    ) -> list[MicroBatch]:
        """Check a batch, and cut it. The whole batch is that of `everyone`, or else this one.

        Args:
            batch: `tokens` [B, S] and `labels` [B, S], optionally `loss_mask` [B, S], and what
                `engine.documents` reads of documents packed into samples.
            needs_labels: whether there is a loss to compute.
            step: decides the random numbers.
            everyone: the ranks that share a global batch, all of which must call this.
            scale: what the loss is multiplied by, a scalar on the device; None for 1.

        Raises:
            ValueError: the batch cannot be cut, has ids outside of the vocabulary, or says of its
                samples what cannot be.
        """
        if isinstance(batch, Mapping):
            batch = self.lengthened(batch)
        check_batch(batch, self.limits, needs_labels=needs_labels)
        check_ids(batch, self.limits)
        check_unread(batch, wait=not self._has_begun)
        self._has_begun = True
        documents = documents_of(batch)
        if needs_labels:
            self._look_at_labels(batch)
        device = self.context.device
        if device.type == "cuda":
            batch = {k: pinned(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return cut(
            batch,
            self.micro_batch_size,
            device=device,
            seed=self.seed,
            step=step,
            topology=self.context.topology,
            targets=needs_labels,
            everyone=everyone,
            scale=scale,
            documents=documents,
            own_labels=self.limits.own_labels,
        )

    def made_up(self, samples: int, length: int) -> list[MicroBatch]:
        """The micro-batches of a batch of so many sequences, for a rehearsal: each has all tokens
        in turn, and all count."""
        tokens = torch.arange(samples * length).remainder(self.limits.vocab_size)
        rows = tokens.view(samples, length)
        return cut(
            {"tokens": rows, "labels": rows},
            self.micro_batch_size,
            device=self.context.device,
            seed=self.seed,
            step=0,
            topology=self.context.topology,
        )

    def _look_at_labels(self, batch: Mapping[str, Any]) -> None:
        """Warn of labels that were not shifted: once, since it may wait for the device."""
        if self._has_seen_labels or self.limits.own_labels:
            return
        self._has_seen_labels = True
        remark = unshifted(batch)
        if remark is not None and self.context.topology.rank == 0:
            warnings.warn(remark, stacklevel=2)
