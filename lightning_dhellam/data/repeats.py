"""Samples that a distributed sampler repeats, so that every rank has as many as the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler


def without_repeats(
    batch: Mapping[str, Any], loader: Any, batch_index: int
) -> Mapping[str, Any] | None:
    """The samples of a batch that no other rank evaluates as well; None if there are none.

    A mean over a data set should count each of its samples once. What the sampler adds in the end
    are the first samples again.

    Args:
        batch: of this rank; tensors whose first dimension is that of `tokens` [B, S] hold samples.
        loader: that it comes from.
        batch_index: which of its batches it is.
    """
    samples = len(batch["tokens"])
    own = own_samples(loader, batch_index, samples)
    if own == samples:
        return batch
    if own == 0:
        return None

    def rows(value: Any) -> Any:
        is_batched = isinstance(value, torch.Tensor) and value.dim() and len(value) == samples
        return value[:own] if is_batched else value

    return {name: rows(value) for name, value in batch.items()}


def own_samples(loader: Any, batch_index: int, samples: int) -> int:
    """How many of the `samples` of a batch, the first ones, are not repeated."""
    sampler = getattr(loader, "sampler", None)
    in_batches = getattr(loader, "batch_sampler", None)
    if in_batches is not None and not isinstance(sampler, DistributedSampler):
        sampler = getattr(in_batches, "sampler", None)
    size = getattr(in_batches, "batch_size", None)
    if not isinstance(loader, DataLoader) or not isinstance(sampler, DistributedSampler):
        return samples
    if size is None or sampler.drop_last:
        return samples
    whole = len(sampler.dataset)  # type: ignore[arg-type]
    own = len(range(sampler.rank, whole, sampler.num_replicas))
    return min(samples, max(0, own - batch_index * size))
