"""What a batch must be so that the engine can cut it into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.engine.weights import IGNORED

_BATCHED = ("tokens", "labels", "loss_mask")
_ID_TYPES = (torch.int64, torch.int32)
_UNSHIFTED = 0.95
"""Share of the labels that may be the tokens themselves before it is said."""


class Limits(NamedTuple):
    """What a model takes.

    Attributes:
        vocab_size: ids are below it.
        max_sequence_length: in tokens.
        tensor_parallel_size: ranks that share each sequence between the layers.
        own_labels: whether the labels are read by the user's own loss alone, so that they may mean
            anything; otherwise they are ids of the vocabulary.
        context_parallel_size: ranks that share each sequence everywhere.
    """

    vocab_size: int
    max_sequence_length: int
    tensor_parallel_size: int
    own_labels: bool = False
    context_parallel_size: int = 1

    @property
    def multiple(self) -> int:
        """What the length of sequences must be a multiple of."""
        pieces = 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size
        return pieces * self.tensor_parallel_size

    @property
    def ids(self) -> tuple[str, ...]:
        """What of a batch holds ids of the vocabulary."""
        return ("tokens",) if self.own_labels else ("tokens", "labels")


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in memory that a GPU copies from by itself, if it is on the host of one.

    For a copy from other memory the host may wait until the GPU has done all that it was given.
    """
    if tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor
    return tensor.pin_memory()


def check_length(
    length: int, longest: int, tensor_parallel_size: int, context_parallel_size: int = 1
) -> None:
    """Refuse sequences that are too long, or that do not divide over the ranks.

    Raises:
        ValueError: names the length and what it must be.
    """
    if length > longest:
        raise ValueError(
            f"sequence_length={length} is longer than the model's max_sequence_length={longest}:"
            " shorten the sequences or raise max_sequence_length"
        )
    pieces = 2 * context_parallel_size * tensor_parallel_size
    if context_parallel_size > 1 and length % pieces:
        raise ValueError(
            f"sequence_length={length} is not a multiple of {pieces}, 2 x"
            f" context_parallel_size={context_parallel_size} x"
            f" tensor_parallel_size={tensor_parallel_size}: every rank holds two equal pieces of"
            " each sequence; change one of them, or pad the sequences"
        )
    if length % tensor_parallel_size:
        raise ValueError(
            f"sequence_length={length} is not a multiple of"
            f" tensor_parallel_size={tensor_parallel_size}: with sequence parallelism every rank"
            " holds an equal part of each sequence; change one of them"
        )


def check_batch(batch: Any, limits: Limits, *, needs_labels: bool) -> None:
    """Refuse a batch that the engine cannot cut into micro-batches. Waits for no device.

    Raises:
        ValueError: says what the batch has, and what it must have.
    """
    needed = ("tokens", "labels") if needs_labels else ("tokens",)
    keys = sorted(map(str, batch.keys())) if hasattr(batch, "keys") else None
    missing = [name for name in needed if keys is None or batch.get(name) is None]
    if missing:
        has = f"a mapping with {keys}" if keys is not None else f"a {type(batch).__name__}"
        raise ValueError(
            f"the DataLoader yields {has}, without {missing}: yield a mapping with `tokens` [B, S]"
            " and `labels` [B, S], the token after each, or as Hugging Face's collators do with"
            " `input_ids` and `labels` at their own places"
        )
    read = _BATCHED if needs_labels else needed
    given = {name: batch[name] for name in read if batch.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the batch's {name} are of type {type(value).__name__}: yield tensors [B, S]"
            )
        if name in limits.ids and value.dtype not in _ID_TYPES:
            raise ValueError(
                f"the batch's {name} have dtype {value.dtype}: they are ids of the vocabulary,"
                f" so yield {' or '.join(map(str, _ID_TYPES))}"
            )
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    if len(set(shapes.values())) != 1 or len(shapes["tokens"]) != 2:
        raise ValueError(f"the batch has shapes {shapes}: all must be [B, S]")
    if not shapes["tokens"][0]:
        raise ValueError("the batch has no samples: use drop_last=True, or a smaller batch size")
    length = shapes["tokens"][1]
    check_length(
        length,
        limits.max_sequence_length,
        limits.tensor_parallel_size,
        limits.context_parallel_size,
    )


def check_ids(batch: Any, limits: Limits) -> None:
    """Refuse ids outside of the vocabulary; tensor-parallel ranks would take them for each other's.

    Looks only at tensors on the host: looking elsewhere would wait.

    Raises:
        ValueError: names the id and the size of the vocabulary.
    """
    if not hasattr(batch, "get"):
        return
    size = limits.vocab_size
    for name in limits.ids:
        ids = batch.get(name)
        # `check_batch` refuses other types.
        if not isinstance(ids, Tensor) or ids.device.type != "cpu" or ids.dtype not in _ID_TYPES:
            continue
        remark = ""
        if name == "labels":
            ids, remark = ids[ids != IGNORED], f", or {IGNORED} for what does not count"
        low, high = (int(value) for value in torch.aminmax(ids)) if ids.numel() else (0, 0)
        if low < 0 or high >= size:
            raise ValueError(
                f"the batch's {name} hold {low if low < 0 else high}, but the model has"
                f" vocab_size={size}: ids must be from 0 to {size - 1}{remark}"
            )


def unshifted(batch: Mapping[str, Any]) -> str | None:
    """What is to be said of labels that were not shifted; None if they seem to be. May wait.

    The label of a token is the one after it. Text of one token again and again fits both.

    Args:
        batch: that `check_batch` has passed, with labels that are ids.
    """
    tokens, labels = batch["tokens"], batch["labels"]
    counts = labels != IGNORED
    if batch.get("loss_mask") is not None:
        counts = counts & (batch["loss_mask"] != 0)
    same = (labels == tokens) & counts
    after = (labels[:, :-1] == tokens[:, 1:]) & counts[:, :-1]
    count, unmoved, moved = (int(value.sum()) for value in (counts, same, after))
    if unmoved <= _UNSHIFTED * count or moved >= unmoved * _UNSHIFTED:
        return None
    return (
        f"{unmoved} of the {count} labels of the first batch are the tokens at their own places, so"
        " that there is nothing to learn: the label of a token is the token after it (labels ="
        " tokens[1:]), unless the tokens are called `input_ids`, as by Hugging Face's collators"
    )
