"""A batch in Hugging Face's words, put into ours.

The key of the tokens says whose words they are, since each convention has its own:

    input_ids, labels           Hugging Face: the label of a token stands at the token's own place,
                                and the model shifts labels by one
    input_ids, shift_labels     Hugging Face, shifted already
    tokens, labels, loss_mask   ours and Megatron's: the label of a token is the one after it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine.masks import MASK
from lightning_dhellam.engine.weights import IGNORED

_SHIFTED = 0.95
"""Share of the labels that must be the next token for them to be taken for shifted ones."""


def in_our_words(batch: Any, *, own_labels: bool = False) -> Any:
    """The batch with `tokens` [B, S], and `labels` [B, S] of which each is the next token.

    One of Hugging Face's collators has `input_ids` [B, S] and no `tokens`. Its labels are shifted
    by one; a sample's last token has none, and neither has padding, where `attention_mask` is 0.
    All other keys stay. A batch that has `tokens`, or is none of these, is returned as it is.

    Looks only at values on the host; looking elsewhere would wait.

    Args:
        batch: what a loader yields.
        own_labels: whether labels may mean anything, so that they stay as they are.

    Raises:
        ValueError: labels count on padding, were shifted by one already, or are said twice and
            differ; or there is a `loss_mask`, of which it is not known where it stands.
    """
    if not isinstance(batch, Mapping) or batch.get("input_ids") is None:
        return batch
    if batch.get("tokens") is not None:
        return batch
    ours = {**batch, "tokens": batch["input_ids"]}
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    if own_labels or (labels is None and shifted is None):
        return ours
    if batch.get("loss_mask") is not None:
        raise ValueError(
            "the batch has input_ids and loss_mask, and with Hugging Face's labels, which are"
            f" shifted here, it is not said whether loss_mask is: set labels to {IGNORED} where"
            " they do not count, or yield `tokens`, `labels` and `loss_mask`, all shifted"
        )
    ours.pop("shift_labels", None)
    if labels is None:
        return ours | {"labels": shifted}
    tokens = batch["input_ids"]
    if not _are_alike(tokens, labels):
        return ours  # `check_batch` refuses them
    mask = batch.get(MASK)
    mask = mask if _are_alike(tokens, mask) else None
    moved = _moved(tokens, labels, mask)
    if shifted is not None:
        _check_same(moved, shifted)
        return ours | {"labels": shifted}
    return ours | {"labels": moved}


def _moved(tokens: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels [B, S] of the tokens before those that they stand at."""
    counts = labels != IGNORED
    if labels.device.type == tokens.device.type == "cpu":
        _check_not_moved(tokens, labels, counts)
        if mask is not None and mask.device.type == "cpu" and bool((counts & (mask == 0)).any()):
            raise ValueError(
                "the batch has labels that count where attention_mask is 0, on padding: set them to"
                f" {IGNORED} there, as transformers' collators do"
            )
    found = torch.full_like(labels, IGNORED)
    found[:, :-1] = labels[:, 1:]
    # What padding on the left says of the first token depends on how attention is computed of
    # tokens that see nothing.
    return found if mask is None else found.masked_fill(mask == 0, IGNORED)


def _check_not_moved(tokens: Tensor, labels: Tensor, counts: Tensor) -> None:
    """Refuse labels that are the tokens after those that they stand at."""
    same = int(((labels == tokens) & counts).sum())
    after = int(((labels[:, :-1] == tokens[:, 1:]) & counts[:, :-1]).sum())
    if after >= _SHIFTED * int(counts.sum()) and same < after * _SHIFTED:
        raise ValueError(
            f"{after} of the {int(counts.sum())} labels of a batch with input_ids are the tokens"
            " after their own: labels beside input_ids are shifted here, as Hugging Face's models"
            " do, so that these would be shifted twice; call the tokens `tokens`, or the labels"
            " `shift_labels`"
        )


def _check_same(moved: Tensor, shifted: Any) -> None:
    if not _are_alike(moved, shifted) or not torch.equal(moved.cpu().long(), shifted.cpu().long()):
        raise ValueError(
            "the batch has labels and shift_labels, and the one shifted by one is not the other:"
            " leave one of them out"
        )


def _are_alike(tokens: Any, value: Any) -> bool:
    return isinstance(tokens, Tensor) and isinstance(value, Tensor) and tokens.shape == value.shape
