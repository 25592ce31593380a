"""Sequences of any length where ranks share each: they are made longer by padding at the end.

Hugging Face's collators pad to the longest sample of a batch, or join its samples, so that every
batch has a length of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine.documents import ENDS, POSITIONS, SEGMENTS
from lightning_dhellam.engine.masks import MASK, original_of, put_on_host
from lightning_dhellam.engine.weights import IGNORED

_FILLED = {"tokens": 0, "input_ids": 0, "labels": IGNORED, "loss_mask": 0, MASK: 0}
"""What padding has by key."""


def lengthened(batch: Mapping[str, Any], multiple: int) -> Mapping[str, Any]:
    """The batch, with padding so that the length of its sequences is a multiple.

    Padding counts in no loss and ends the last document of a sample, so nothing changes but the
    logits, of which there are more. Whatever else is in the batch stays as it is.

    Args:
        batch: in our words.
        multiple: of tokens.
    """
    tokens = batch.get("tokens")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.shape[1] % multiple:
        return batch
    more = -tokens.shape[1] % multiple
    return {name: _longer(name, value, tokens.shape, more) for name, value in batch.items()}


def _longer(name: str, value: Any, shape: torch.Size, more: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    if name in ENDS:
        # The end of a sample moves by what is added to it and to those before.
        longer = value + value // shape[1] * more
    elif name in _FILLED and value.shape == shape:
        longer = torch.nn.functional.pad(value, (0, more), value=_FILLED[name])
    elif name in (*POSITIONS, *SEGMENTS) and value.dim() and value.shape[-1] == shape[1]:
        last = value[..., -1:].expand(*value.shape[:-1], more)
        steps = torch.arange(1, more + 1, device=value.device, dtype=value.dtype)
        longer = torch.cat([value, last + steps if name in POSITIONS else last], dim=-1)
    else:
        return value
    original = original_of(value)
    if original is not None:
        put_on_host(longer, _longer(name, original, shape, more))
    return longer
