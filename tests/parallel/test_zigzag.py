"""The pieces of a sequence that context-parallel ranks have."""

from __future__ import annotations

import pytest
import torch

from lightning_dhellam.parallel import zigzag

CPU = torch.device("cpu")


def test_pieces_lie_as_the_picture_says() -> None:
    places = [zigzag.places(8, rank, 4, CPU).tolist() for rank in range(4)]
    assert places == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert zigzag.places(5, 0, 1, CPU).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_make_the_whole_again(ranks: int) -> None:
    whole = torch.arange(2 * 12 * ranks * 3).view(2, 12 * ranks, 3)
    parts = [zigzag.own_part(whole, 1, rank, ranks) for rank in range(ranks)]
    places = torch.cat([zigzag.places(12 * ranks, rank, ranks, CPU) for rank in range(ranks)])
    assert torch.equal(torch.cat(parts, dim=1), whole[:, places])
    assert torch.equal(zigzag.whole_sequence(torch.stack(parts), 1), whole)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_attends_to_as_much(ranks: int) -> None:
    seen = [(zigzag.places(12 * ranks, rank, ranks, CPU) + 1).sum() for rank in range(ranks)]
    assert len({int(pairs) for pairs in seen}) == 1
