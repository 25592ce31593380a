"""What a batch says by keys that nothing reads is refused, unless it changes nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine.batch import IGNORED
from lightning_dhellam.engine.unread import UNREAD, check_unread

B, S = 2, 4
TOKENS = torch.arange(B * S).view(B, S)
LABELS = torch.tensor([[1, 2, 3, 4], [5, 6, IGNORED, IGNORED]])
PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()

NOTHING: dict[str, list[Any]] = {
    "position_ids": [None, torch.arange(S), torch.arange(S).expand(B, S)],
    "attention_mask": [
        torch.ones(B, S),
        torch.ones(B, S, dtype=torch.bool),
        PADDED,
        CAUSAL,
        ~CAUSAL.expand(B, 1, S, S),
        CAUSAL.expand(B, 1, S, S).long(),
    ],
    "segment_ids": [torch.zeros(B, S), torch.tensor([[3] * S, [7] * S])],
    "cu_seqlens": [torch.tensor([0, S, 2 * S]), torch.tensor([[0, S]] * B).int()],
    "token_type_ids": [torch.zeros(B, S).long()],
    "input_ids": [TOKENS.int()],
    "shift_labels": [LABELS],
}
SOMETHING: dict[str, list[Any]] = {
    "position_ids": [
        torch.zeros(B, S),
        torch.tensor([0, 1, 0, 1]),
        torch.arange(S) + 1,
        torch.arange(S + 1),
        [[0, 1, 2, 3]] * B,
    ],
    "attention_mask": [
        1 - PADDED,
        PADDED.flip(0),  # masks what counts
        PADDED.flip(1),
        torch.zeros(B, S),
        torch.ones(S, S),
        torch.eye(S).bool(),
        CAUSAL.float().log(),
        torch.ones(B, S + 1),
    ],
    "segment_ids": [torch.tensor([[1, 1, 2, 2], [1, 1, 1, 1]]), torch.zeros(B)],
    "cu_seqlens": [torch.tensor([0, 2, S, 2 * S]), torch.tensor([0, 2 * S])],
    "token_type_ids": [torch.tensor([0, 0, 1, 1])],
    "input_ids": [TOKENS + 1, TOKENS[:1]],
    "shift_labels": [TOKENS],
    "inputs_embeds": [torch.zeros(B, S, 8)],
    "past_key_values": ["a cache"],
}


def _batch(name: str, value: Any, **changes: Tensor) -> dict[str, Any]:
    return {"tokens": TOKENS, "labels": LABELS, name: value, **changes}


@pytest.mark.parametrize("name", NOTHING)
def test_what_changes_nothing_may_stay(name: str) -> None:
    for value in NOTHING[name]:
        check_unread(_batch(name, value))


@pytest.mark.parametrize("name", SOMETHING)
def test_what_says_something_is_refused_by_name(name: str) -> None:
    for value in SOMETHING[name]:
        with pytest.raises(ValueError, match=rf"^the batch has {name}, which [^\n]*: leave {name}"):
            check_unread(_batch(name, value))


def test_padding_is_what_does_not_count_and_lies_at_the_end() -> None:
    counts = torch.ones(B, S)
    counts[1, 2:] = 0
    check_unread(_batch("attention_mask", PADDED, labels=TOKENS, loss_mask=counts))
    check_unread({"tokens": TOKENS, "attention_mask": PADDED})  # without a loss nothing counts
    with pytest.raises(ValueError, match="attention_mask"):
        check_unread(_batch("attention_mask", PADDED, labels=TOKENS))
    holes = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])
    with pytest.raises(ValueError, match="attention_mask"):
        check_unread({"tokens": TOKENS, "attention_mask": holes})


def test_no_device_is_asked_unless_waiting_is_allowed() -> None:
    elsewhere = torch.zeros(B, S, device="meta")
    check_unread(_batch("position_ids", elsewhere))
    with pytest.raises(NotImplementedError, match="meta"):
        check_unread(_batch("position_ids", elsewhere), wait=True)


def test_every_key_is_in_some_case() -> None:
    rules = {id(rule) for name, rule in UNREAD.items() if name in SOMETHING}
    assert rules == {id(rule) for rule in UNREAD.values()}
    assert all(re.fullmatch(r"[a-z_]+", name) for name in UNREAD)
