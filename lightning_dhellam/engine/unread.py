"""Keys of a batch that other trainers read and the operators do not.

One that changes nothing may stay: a mask that masks nothing, positions from 0 on. Whatever it says
beyond that would be dropped without a word, and so it is refused. A key that the operators come to
read leaves the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.engine.batch import IGNORED

Batch = Mapping[str, Any]


class Unread(NamedTuple):
    """A key that nothing reads.

    Attributes:
        changes_nothing: whether a value, on the host, says what is so without it.
        otherwise: what is wrong with a value that says something else.
    """

    changes_nothing: Callable[[Tensor, Batch], bool]
    otherwise: str


def check_unread(batch: Any, *, wait: bool = False) -> None:
    """Refuse what a batch says by keys that the operators do not read, unless it changes nothing.

    Looks only at values on the host, since looking elsewhere would wait, unless `wait` allows it.

    Raises:
        ValueError: names the key.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("tokens"), Tensor):
        return  # `check_batch` refuses it
    for name, rule in UNREAD.items():
        value = batch.get(name)
        if value is None:
            continue
        if isinstance(value, Tensor):
            if value.device.type != "cpu" and not wait:
                continue
            value = value.cpu()
        if not isinstance(value, Tensor) or not rule.changes_nothing(value, batch):
            raise ValueError(
                f"the batch has {name}, which {rule.otherwise}: leave {name} out, or give it"
                " another name if only your own code reads it"
            )


def _never(value: Tensor, batch: Batch) -> bool:
    return False


def _plain_positions(value: Tensor, batch: Batch) -> bool:
    """[..., S]: every sample begins at 0."""
    length = batch["tokens"].shape[-1]
    return _ends_in(value, length) and bool((value == torch.arange(length)).all())


def _masks_nothing(value: Tensor, batch: Batch) -> bool:
    """[B, S]: of 1, or of 0 behind all that counts, where causal attention never looks.

    [..., S, S]: causal, by what is attended to, or by what is not as with Megatron.
    """
    shape = tuple(batch["tokens"].shape)
    seen = value != 0
    if tuple(value.shape) == shape:
        at_the_end = not (seen[:, 1:] & ~seen[:, :-1]).any()
        return bool(seen.all()) or (at_the_end and not bool((_counts(batch) & ~seen).any()))
    if not _ends_in(value, shape[-1], shape[-1]) or value.is_floating_point():
        return False
    causal = torch.ones(shape[-1], shape[-1], dtype=torch.bool).tril()
    return bool((seen == causal).all()) or bool((seen != causal).all())


def _one_segment(value: Tensor, batch: Batch) -> bool:
    """[..., S]: each sample is one segment."""
    length = batch["tokens"].shape[-1]
    return _ends_in(value, length) and bool((value == value[..., :1]).all())


def _one_sequence(value: Tensor, batch: Batch) -> bool:
    """Ends of the sequences: each sample is one, by itself or in a row of all."""
    samples, length = batch["tokens"].shape
    ends = torch.arange(samples + 1) * length
    by_itself = value.dim() == 2 and _ends_in(value, 2) and bool((value == ends[:2]).all())
    return by_itself or torch.equal(value.flatten().long(), ends)


def _one_type(value: Tensor, batch: Batch) -> bool:
    return not value.any()


def _same_as(name: str) -> Callable[[Tensor, Batch], bool]:
    def same(value: Tensor, batch: Batch) -> bool:
        other = batch.get(name)
        return isinstance(other, Tensor) and torch.equal(value.long(), other.cpu().long())

    return same


def _counts(batch: Batch) -> Tensor:
    """Which tokens count in the loss, [B, S]; none where there is no loss."""
    labels, mask = batch.get("labels"), batch.get("loss_mask")
    tokens = batch["tokens"].cpu()
    if not isinstance(labels, Tensor):
        return torch.zeros_like(tokens, dtype=torch.bool)
    counts = labels.cpu() != IGNORED
    if isinstance(mask, Tensor):
        counts = counts & (mask.cpu() != 0)
    return counts if counts.shape == tokens.shape else torch.ones_like(tokens, dtype=torch.bool)


def _ends_in(value: Tensor, *sizes: int) -> bool:
    return tuple(value.shape[-len(sizes) :]) == sizes


_POSITIONS = Unread(
    _plain_positions,
    "are not 0 to S-1 in every sample, and positions are counted by the model",
)
_MASK = Unread(
    _masks_nothing,
    "masks what causal attention sees, and attention here is causal and no more: only padding at"
    " the end, on labels of -100, needs no mask",
)
_SEGMENTS = Unread(
    _one_segment,
    "splits samples into segments, and every sample is attended to as one sequence",
)
_ENDS = Unread(
    _one_sequence,
    "packs several sequences into a sample, and every sample is attended to as one sequence",
)
_INPUT = Unread(_never, "the model does not take")

UNREAD: Mapping[str, Unread] = {
    "position_ids": _POSITIONS,
    "positions": _POSITIONS,
    "attention_mask": _MASK,
    **dict.fromkeys(("segment_ids", "sequence_ids", "document_ids", "seq_idx"), _SEGMENTS),
    **dict.fromkeys(
        ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_kv", "cu_seq_lens_q", "cu_seq_lens_k"), _ENDS
    ),
    "token_type_ids": Unread(_one_type, "are not all 0, and the model has no types of tokens"),
    "input_ids": Unread(_same_as("tokens"), "differ from the tokens, which are what is read"),
    "shift_labels": Unread(_same_as("labels"), "differ from the labels, which are what is read"),
    **dict.fromkeys(
        (
            "inputs_embeds",
            "decoder_input_ids",
            "encoder_hidden_states",
            "encoder_outputs",
            "past_key_values",
            "head_mask",
            "pixel_values",
        ),
        _INPUT,
    ),
}
