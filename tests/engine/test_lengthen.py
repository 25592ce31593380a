"""Padding at the end of sequences changes nothing that is said of them."""

from __future__ import annotations

import pytest
import torch

from lightning_dhellam.engine.documents import documents_of, remember
from lightning_dhellam.engine.lengthen import lengthened
from lightning_dhellam.engine.masks import original_of

TOKENS = torch.tensor([[4, 7, 2, 9, 1], [3, 5, 8, 6, 2]])
LABELS = TOKENS.roll(-1, 1)
SAID: dict[str, torch.Tensor] = {
    "position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]),
    "seq_idx": torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]]),
    "cu_seqlens": torch.tensor([0, 2, 5, 10]),
    "attention_mask": torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("name", SAID)
def test_documents_begin_where_they_did(name: str) -> None:
    batch = {"tokens": TOKENS, "labels": LABELS, name: SAID[name], "other": TOKENS, "text": "a"}
    longer = lengthened(batch, 4)
    assert longer["tokens"][:, 5:].tolist() == [[0] * 3] * 2
    assert longer["labels"][:, 5:].tolist() == [[-100] * 3] * 2
    assert longer["other"] is TOKENS and longer["text"] == "a"
    found, expected = documents_of(longer), documents_of(batch)
    assert found is not None and expected is not None and expected.ends == ((2, 5), (5,))
    ends = ((2, 5, 8), (5, 8)) if name == "attention_mask" else ((2, 8), (8,))
    assert found.ends == ends
    assert found.positions is not None and expected.positions is not None
    assert torch.equal(found.positions[:, :5], expected.positions)


def test_a_length_that_divides_stays() -> None:
    batch = {"tokens": TOKENS, "labels": LABELS}
    assert all(lengthened(batch, multiple) is batch for multiple in (1, 5))


def test_the_host_still_knows_what_is_on_a_device() -> None:
    batch = {"tokens": TOKENS, **SAID}
    moved = {name: value.to("meta") for name, value in batch.items()}
    longer = lengthened(remember(moved, batch), 4)
    on_host = lengthened(batch, 4)
    for name in SAID:
        original = original_of(longer[name])
        assert original is not None and torch.equal(original, on_host[name]), name
