"""What a batch says by keys that nothing reads is refused, unless it changes nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine.unread import UNREAD, check_unread
from lightning_dhellam.engine.weights import IGNORED

B, S = 2, 4
TOKENS = torch.arange(B * S).view(B, S)
LABELS = torch.tensor([[1, 2, 3, 4], [5, 6, IGNORED, IGNORED]])

NOTHING: dict[str, list[Any]] = {
    "token_type_ids": [None, torch.zeros(B, S).long()],
    "input_ids": [TOKENS.int()],
    "shift_labels": [LABELS],
}
SOMETHING: dict[str, list[Any]] = {
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


def test_no_device_is_asked_unless_waiting_is_allowed() -> None:
    elsewhere = torch.zeros(B, S, device="meta")
    check_unread(_batch("token_type_ids", elsewhere))
    with pytest.raises(NotImplementedError, match="meta"):
        check_unread(_batch("token_type_ids", elsewhere), wait=True)


def test_every_key_is_in_some_case() -> None:
    rules = {id(rule) for name, rule in UNREAD.items() if name in SOMETHING}
    assert rules == {id(rule) for rule in UNREAD.values()}
    assert all(re.fullmatch(r"[a-z_]+", name) for name in UNREAD)
