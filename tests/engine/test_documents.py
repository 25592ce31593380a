"""What batches say of documents, in every spelling, and where their documents then lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine.documents import (
    ENDS,
    POSITIONS,
    SEGMENTS,
    Documents,
    documents_of,
    remember,
    runs_of,
)
from lightning_dhellam.engine.weights import IGNORED
from lightning_dhellam.parallel import zigzag

B, S = 2, 6
TOKENS = torch.arange(B * S).view(B, S)
LABELS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, IGNORED, IGNORED, IGNORED]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
PLAIN = torch.arange(S)

PACKED = Documents(torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]), ((2, 5, 6), (6,)))
"""Three documents in one sample, the last of one token; one in the other."""
NUMBERS = torch.tensor([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1]])
SEEN = (NUMBERS[:, :, None] == NUMBERS[:, None]) & CAUSAL
ROW = torch.tensor([0, 2, 5, 6, 12])
assert PACKED.positions is not None
_OF_TOKENS = [PACKED.positions, PACKED.positions.int()]
_NUMBERED = [NUMBERS, NUMBERS - 1, 7 - NUMBERS]
_ENDING = [
    ROW,
    ROW.int(),
    torch.tensor([0, 2, 2, 5, 6, 12, 12]),  # some documents are empty
    torch.tensor([[0, 2, 5, 6], [0, 6, 6, 6]]),
]
SPELLINGS: dict[str, list[Tensor]] = {
    **dict.fromkeys(POSITIONS, _OF_TOKENS),
    **dict.fromkeys(SEGMENTS, _NUMBERED),
    **dict.fromkeys(ENDS, _ENDING),
    "attention_mask": [NUMBERS, SEEN, ~SEEN[:, None], SEEN[:, None].long()],
}
NOTHING: dict[str, list[Any]] = {
    "position_ids": [None, PLAIN, PLAIN[None], PLAIN.expand(B, S)],
    "attention_mask": [
        torch.ones(B, S),
        torch.ones(B, S, dtype=torch.bool),
        PADDED,
        3 * PADDED,
        CAUSAL,
        ~CAUSAL.expand(B, 1, S, S),
    ],
    "segment_ids": [torch.zeros(B, S).long(), torch.tensor([[3] * S, [7] * S])],
    "cu_seqlens": [torch.tensor([0, S, 2 * S]), torch.tensor([[0, S]] * B).int()],
}


def _batch(**said: Any) -> dict[str, Any]:
    return {"tokens": TOKENS, "labels": LABELS, **said}


def _equal(found: Documents | None, expected: Documents) -> bool:
    if found is None or found.ends != expected.ends:
        return False
    positions = [
        PLAIN.expand(B, S) if d.positions is None else d.positions for d in (found, expected)
    ]
    return torch.equal(*positions)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_says_the_same(name: str) -> None:
    for value in SPELLINGS[name]:
        assert _equal(documents_of(_batch(**{name: value})), PACKED), value


def test_what_is_said_twice_may_agree() -> None:
    batch = _batch(position_ids=PACKED.positions, cu_seq_lens_q=ROW, cu_seq_lens_k=ROW.int())
    assert _equal(documents_of(batch | {"seq_idx": NUMBERS, "attention_mask": PADDED}), PACKED)


@pytest.mark.parametrize("name", NOTHING)
def test_samples_of_one_document_are_nothing_special(name: str) -> None:
    for value in NOTHING[name]:
        assert documents_of(_batch(**{name: value})) is None


def test_positions_and_attention_may_restart_without_each_other() -> None:
    """As with reset_position_ids or reset_attention_mask alone."""
    for whole in ({"document_ids": torch.zeros(B, S).long()}, {"attention_mask": CAUSAL}):
        found = documents_of(_batch(position_ids=PACKED.positions, **whole))
        assert found is not None and _equal(found, PACKED._replace(ends=((6,), (6,))))
        assert not found.are_packed(slice(None))
    for parted in ({"document_ids": NUMBERS}, {"attention_mask": SEEN}):
        found = documents_of(_batch(position_ids=PLAIN, **parted))
        assert _equal(found, PACKED._replace(positions=None))


def test_a_sample_of_one_document_needs_no_packed_kernel() -> None:
    rows = [slice(0, 1), slice(1, 2), slice(0, 2)]
    assert [PACKED.are_packed(one) for one in rows] == [True, False, True]
    assert runs_of(PACKED, slice(1, 2), (0, 1), lambda x: x) is None


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "positions that jump": (
        {"position_ids": torch.tensor([0, 1, 3, 4, 5, 6])},
        r"position_ids that go from 1 to 3 in sample 0: in a document they ascend by 1",
    ),
    "positions from 1 on": (
        {"position_ids": PLAIN + 1},
        r"position_ids that begin a sample with 1: a sample begins with a document",
    ),
    "positions of another length": (
        {"position_ids": torch.arange(S + 1)},
        r"position_ids of shape \(7,\), and tokens \(2, 6\): yield one for each token",
    ),
    "three positions for each": ({"position_ids": torch.zeros(3, B, S).long()}, r"shape \(3, 2, 6"),
    "positions in floats": ({"position_ids": PLAIN.float()}, r"position_ids in torch.float32"),
    "no tensor": ({"position_ids": [[0, 1]]}, r"position_ids of type list: yield a tensor"),
    "ends before the end": (
        {"cu_seqlens": torch.tensor([0, 2, 6])},
        r"cu_seqlens from 0 to 6: they begin at 0 and end at the number of tokens, 12",
    ),
    "ends beyond a sample": (
        {"cu_seqlens": torch.tensor([[0, 6], [0, 7]])},
        r"cu_seqlens from 0 to 7: .* tokens of a sample, 6",
    ),
    "ends from 1 on": ({"cu_seqlens_q": torch.tensor([1, 12])}, r"cu_seqlens_q from 1 to 12"),
    "ends that descend": (
        {"cu_seqlens": torch.tensor([0, 5, 2, 12])},
        r"cu_seqlens that do not ascend: 5, then 2",
    ),
    "a document in two samples": (
        {"cu_seqlens": torch.tensor([0, 4, 12])},
        r"cu_seqlens with a document that crosses 6, where sample 1 begins",
    ),
    "ends in three dimensions": (
        {"cu_seqlens": torch.zeros(B, 2, 2).long()},
        r"cu_seqlens of shape \(2, 2, 2\): yield \[N \+ 1\], from 0 to the 12 tokens",
    ),
    "a document in two pieces": (
        {"segment_ids": torch.tensor([1, 2, 1, 1, 1, 1])},
        r"segment_ids in sample 0 with a number that comes again after another",
    ),
    "positions and ends that differ": (
        {"position_ids": PLAIN, "cu_seqlens": ROW},
        r"position_ids and cu_seqlens, which say that documents begin in different places: leave",
    ),
    "positions and segments that differ": (
        {"position_ids": torch.tensor([0, 1, 2, 0, 1, 2]), "segment_ids": NUMBERS},
        r"position_ids and segment_ids, which say",
    ),
    "ends of queries and keys that differ": (
        {"cu_seqlens_q": ROW, "cu_seqlens_kv": torch.tensor([0, 6, 12])},
        r"cu_seqlens_q and cu_seqlens_kv, which say",
    ),
    "two positions": ({"position_ids": PLAIN, "positions": PACKED.positions}, r"and positions"),
    **{
        f"mask {number}": ({"attention_mask": mask}, "attention_mask, which masks what causal")
        for number, mask in enumerate(
            (
                1 - PADDED,
                PADDED.flip(0),  # masks what counts
                PADDED.flip(1),
                torch.zeros(B, S),
                torch.tensor([[1, 1, 0, 1, 1, 1], [1] * S]),
                torch.tensor([[1, 2, 2, 1, 1, 1], [1] * S]),
                torch.ones(S, S),
                torch.ones(S, S).long(),
                CAUSAL.long() - torch.eye(S).long(),
                CAUSAL & ~CAUSAL.roll(2, 0),  # a window
                CAUSAL.float().log(),
                torch.ones(B, S + 1),
            )
        )
    },
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_in_one_line(name: str) -> None:
    said, message = BAD[name]
    with pytest.raises(ValueError, match=rf"^the batch has [^\n]*{message}[^\n]*$"):
        documents_of(_batch(**said))


def test_padding_is_what_does_not_count_and_lies_at_the_end() -> None:
    counts = torch.ones(B, S)
    counts[1, 3:] = 0
    said = {"attention_mask": PADDED}
    assert documents_of({"tokens": TOKENS, "labels": TOKENS, "loss_mask": counts, **said}) is None
    assert documents_of({"tokens": TOKENS, **said}) is None  # without a loss nothing counts
    with pytest.raises(ValueError, match="attention_mask"):
        documents_of({"tokens": TOKENS, "labels": TOKENS, **said})


def test_the_host_remembers_what_is_on_a_device() -> None:
    class Away(Tensor):
        """A tensor whose values the host would have to wait for."""

        def cpu(self, *_: Any, **__: Any) -> Tensor:
            raise AssertionError("the host waits")

    batch = _batch(position_ids=PACKED.positions)
    moved = remember(
        {**batch, "position_ids": batch["position_ids"].clone().as_subclass(Away)}, batch
    )
    assert _equal(documents_of(moved), PACKED)
    moved["position_ids"] = moved["position_ids"][:]  # another tensor: of this nobody knows
    with pytest.raises(AssertionError, match="the host waits"):
        documents_of(moved)
    again = remember({**batch, "position_ids": batch["position_ids"].clone()}, batch)
    again["position_ids"].copy_(PLAIN)
    assert documents_of(again) is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_runs_say_who_sees_whom_in_every_hop(ranks: int) -> None:
    """Documents that cross pieces, of one token, and that begin or end with a piece."""
    length = 12 * ranks
    generator = torch.Generator().manual_seed(ranks)
    number = torch.rand(3, length, generator=generator).lt(0.2).long().cumsum(dim=1)
    number[0, :] = 0
    found = documents_of({"tokens": number, "segment_ids": number})
    assert found is not None
    place = torch.arange(length)
    wanted = (number[:, :, None] == number[:, None]) & (place[:, None] >= place)
    assert torch.equal(found.unseen(), ~wanted)
    for rank in range(ranks):
        hops = runs_of(found, slice(None), (rank, ranks), lambda x: x)
        assert hops is not None
        if ranks > 1:
            *hops, whole = hops
            assert whole.longest == whole.queries.diff().max()
            alone = runs_of(found, slice(None), (0, 1), lambda x: x)
            assert alone is not None and torch.equal(whole.queries, alone[0].keys)
        assert len(hops) == ranks
        seen = torch.zeros_like(wanted)
        for hop, runs in enumerate(hops):
            mine, theirs = (
                torch.cat([place.chunk(2 * ranks)[piece] for piece in pieces])
                for pieces in zigzag.that_meet(rank, ranks, hop)
            )
            lengths = torch.stack([runs.queries, runs.keys]).diff()
            assert runs.queries.dtype == torch.int32 and runs.longest == lengths.max()
            of_query, of_key = (
                torch.arange(len(ends) - 1).repeat_interleave(ends.diff()).view(3, -1)
                for ends in (runs.queries, runs.keys)
            )
            assert of_query.shape == (3, len(mine)) and of_key.shape == (3, len(theirs))
            pairs = of_query[:, :, None] == of_key[:, None]
            if hop == 0:
                pairs = pairs.tril()
            seen[:, mine[:, None], theirs] |= pairs
        own = zigzag.places(length, rank, ranks, torch.device("cpu"))
        assert torch.equal(seen[:, own], wanted[:, own])
