"""Keys of a batch that other trainers read and the operators do not.

One that changes nothing may stay, such as types of tokens that are all 0. Whatever it says beyond
that would be dropped without a word, and so it is refused. A key that the operators come to read
leaves the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def _one_type(value: Tensor, batch: Batch) -> bool:
    return not value.any()


def _same_as(name: str) -> Callable[[Tensor, Batch], bool]:
    def same(value: Tensor, batch: Batch) -> bool:
        other = batch.get(name)
        return isinstance(other, Tensor) and torch.equal(value.long(), other.cpu().long())

    return same


_INPUT = Unread(_never, "the model does not take")

UNREAD: Mapping[str, Unread] = {
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
