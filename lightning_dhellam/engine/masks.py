"""The masks of attention that a batch may have: they say where documents begin, or are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine.weights import IGNORED

MASK = "attention_mask"
"""The key of one."""
COUNTS = ("labels", "loss_mask")
"""What says that a token is no padding."""

_ON_HOST = "_on_host"


def put_on_host(value: Tensor, original: Tensor) -> None:
    """Have `on_host` find `original` for its copy on a device, unless that is changed."""
    setattr(value, _ON_HOST, (value._version, original))


def original_of(value: Tensor) -> Tensor | None:
    """What `put_on_host` was given, unless the copy was changed since."""
    version, original = getattr(value, _ON_HOST, (-1, None))
    return original if version == value._version else None


def on_host(value: Tensor) -> Tensor:
    """The tensor on the host, which waits for its device unless it knows what it came from."""
    original = original_of(value)
    return value.cpu() if original is None else original


def begins_of_mask(mask: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """Where documents begin by an `attention_mask`, [B, S] bool; None if it says nothing of them.

    Either [B, S], of the numbers of documents, or 1 for all of them, and 0 for padding before and
    after them, of which the former is a document of its own; or [..., S, S], causal within each
    document: what is attended to, or what is not as with Megatron.

    Raises:
        ValueError: it masks something else.
    """
    shape = tuple(batch["tokens"].shape)
    begins = None
    if tuple(mask.shape) == shape:
        if not _pads_ends(mask != 0, batch):
            begins = None
        elif not (is_numbered(mask) or pads_the_beginning(mask)):
            return None
        else:
            begins = _of_numbers(mask)
    elif mask.dim() > 1 and tuple(mask.shape[-2:]) == (shape[1],) * 2:
        begins = _of_square(mask, shape)
    if begins is None:
        raise ValueError(
            "the batch has attention_mask, which masks what causal attention within documents sees,"
            " and attention here is that and no more: only padding at the ends of a sample, on"
            " labels of -100, may be masked; leave attention_mask out, or give it another name if"
            " only your own code reads it"
        )
    return begins


def pads_the_beginning(mask: Tensor) -> bool:
    """Whether [B, S] has a 0 before what is seen."""
    seen = mask != 0
    return bool((seen[:, 1:] & ~seen[:, :1]).any())


def is_numbered(mask: Tensor) -> bool:
    """Whether [B, S] has other numbers than 0 and one in each sample."""
    return bool(((mask != 0) & (mask != mask.amax(dim=1, keepdim=True))).any())


def _pads_ends(seen: Tensor, batch: Mapping[str, Any]) -> bool:
    """Whether what is not seen is before or behind all that is, and does not count."""
    if seen.all():
        return True
    begins = seen[:, 0].int() + (seen[:, 1:] & ~seen[:, :-1]).sum(dim=1)
    return bool((begins <= 1).all()) and not bool((_counts(batch) & ~seen).any())


def _of_numbers(mask: Tensor) -> Tensor | None:
    """[B, S]: None if documents are not numbered as they lie, ascending."""
    before, after = mask[:, :-1], mask[:, 1:]
    if ((after < before) & (after != 0)).any():
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
    counts = on_host(labels) != IGNORED
    if isinstance(mask, Tensor):
        counts = counts & (on_host(mask) != 0)
    return counts if counts.shape == tokens.shape else torch.ones(tokens.shape, dtype=torch.bool)
