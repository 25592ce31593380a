"""The masks of attention that a batch may have: they say where documents begin, or are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine.weights import IGNORED


def begins_of_mask(mask: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """Where documents begin by an `attention_mask`, [B, S] bool; None if it says nothing of them.

    Either [B, S], of the numbers of documents, or 1 for all of them, and 0 for padding at the end;
    or [..., S, S], causal within each document: what is attended to, or what is not as with
    Megatron.

    Raises:
        ValueError: it masks something else.
    """
    shape = tuple(batch["tokens"].shape)
    begins = None
    if tuple(mask.shape) == shape:
        if _pads_the_end(mask != 0, batch) and not _is_numbered(mask):
            return None
        begins = _of_numbers(mask, batch)
    elif mask.dim() > 1 and tuple(mask.shape[-2:]) == (shape[1],) * 2:
        begins = _of_square(mask, shape)
    if begins is None:
        raise ValueError(
            "the batch has attention_mask, which masks what causal attention within documents sees,"
            " and attention here is that and no more: only padding at the end, on labels of -100,"
            " needs no mask; leave attention_mask out, or give it another name if only your own"
            " code reads it"
        )
    return begins


def _pads_the_end(seen: Tensor, batch: Mapping[str, Any]) -> bool:
    """Whether what is not seen is behind all that is, and does not count."""
    if seen.all():
        return True
    at_the_end = not (seen[:, 1:] & ~seen[:, :-1]).any()
    return at_the_end and not bool((_counts(batch) & ~seen).any())


def _is_numbered(mask: Tensor) -> bool:
    """Whether [B, S] has other numbers than 0 and one in each sample."""
    return bool(((mask != 0) & (mask != mask[:, :1])).any())


def _of_numbers(mask: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """[B, S]: None if documents are not numbered as they lie, ascending."""
    before, after = mask[:, :-1], mask[:, 1:]
    if ((after < before) & (after != 0)).any() or not _pads_the_end(mask != 0, batch):
        return None
    begins = torch.ones(mask.shape, dtype=torch.bool)
    begins[:, 1:] = before != after
    return begins


def _of_square(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """[..., S, S]: None if it is no mask of causal attention within documents."""
    samples, length = shape
    rows = mask.reshape(-1, length, length)
    if mask.is_floating_point() or len(rows) not in (1, samples):
        return None
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for seen in (rows != 0, rows == 0):
        # The first token that each sees begins its document.
        first = seen.int().argmax(dim=2)
        together = first[:, :, None] == first[:, None]
        if torch.equal(seen, together & causal):
            begins = first == torch.arange(length)
            return begins.expand(shape)
    return None


def _counts(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens count in the loss, [B, S]; none where there is no loss."""
    labels, mask = batch.get("labels"), batch.get("loss_mask")
    tokens = batch["tokens"]
    if not isinstance(labels, Tensor):
        return torch.zeros(tokens.shape, dtype=torch.bool)
    counts = labels.cpu() != IGNORED
    if isinstance(mask, Tensor):
        counts = counts & (mask.cpu() != 0)
    return counts if counts.shape == tokens.shape else torch.ones(tokens.shape, dtype=torch.bool)
