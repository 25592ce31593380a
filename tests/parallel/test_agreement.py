"""What ranks tell each other of values and of what went wrong."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch.distributed as dist

from lightning_dhellam.parallel import collectives
from lightning_dhellam.parallel.collectives import (
    of_all_ranks,
    together,
    try_together,
    values_or_error,
)
from tests.ranks import run_ranks

RANKS = 3
ROOM = collectives._AT_ONCE
_AROUND = ROOM - len(pickle.dumps("x" * 300)) + 300
"""As many letters as are pickled to what there is room for."""
SIZES = [(0, 1, 2), (_AROUND,) * 3, (_AROUND + 1,) * 3, (0, 10 * ROOM, 5), (3 * ROOM, 0, 2 * ROOM)]


def _told(rank: int) -> tuple[list[list[int]], list[list[int]], list[Any]]:
    """How long what all ranks have told is, of all of them and of the last two, and in how many
    exchanges."""
    last = dist.new_group([1, 2])
    calls = 0
    once = collectives._bytes_of_all

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return once(*args)

    collectives._bytes_of_all = counted
    found, of_last, exchanges = [], [], []
    for sizes in SIZES:
        calls = 0
        values = of_all_ranks(f"{rank}" * sizes[rank], dist.group.WORLD)
        assert all(set(text) <= {f"{other}"} for other, text in enumerate(values))
        found.append([len(text) for text in values])
        exchanges.append(calls)
        if rank:
            of_last.append([len(v) for v in of_all_ranks("x" * sizes[rank], last)])
    return found, of_last, exchanges


def test_ranks_tell_each_other_values_of_any_length() -> None:
    for rank, (found, of_last, exchanges) in enumerate(run_ranks(RANKS, _told)):
        assert found == [list(sizes) for sizes in SIZES]
        assert of_last == ([list(sizes[1:]) for sizes in SIZES] if rank else [])
        assert exchanges == [1, 1, 2, 2, 2]


def _outcomes(rank: int) -> list[str]:
    said = []
    for failing, kind in ((None, None), (1, ValueError), (2, OSError), (0, SystemExit)):

        def part(failing: Any = failing, kind: Any = kind) -> int:
            if rank == failing:
                raise kind(f"fault of {rank}")
            return 10 * rank

        try:
            said.append(f"{together(part, dist.group.WORLD)}")
        except (Exception, SystemExit) as error:
            said.append(f"{type(error).__name__}: {error}")
        values, error = values_or_error(part, dist.group.WORLD)
        said.append(f"{values}" if error is None else f"{type(error).__name__}: {error}")
        mine, failures = try_together(part, dist.group.WORLD)
        said.append(f"{mine} {[failure.text for failure in failures]}")
    return said


@pytest.fixture(scope="module")
def outcomes() -> list[list[str]]:
    return run_ranks(RANKS, _outcomes)


@pytest.mark.parametrize("rank", range(RANKS))
def test_what_fails_on_one_rank_is_known_to_all(outcomes: list[list[str]], rank: int) -> None:
    said = outcomes[rank]
    assert said[:3] == [f"{10 * rank}", "[0, 10, 20]", "None []"]
    for at, (failing, own, others) in enumerate(
        [(1, "ValueError", "ValueError"), (2, "OSError", "RuntimeError")], 1
    ):
        text = f"fault of {failing}"
        heard = f"rank {failing}: {own}: {text}"
        raised = f"{own}: {text}" if rank == failing else f"{others}: {heard}"
        mine = text if rank == failing else "None"
        assert said[3 * at : 3 * at + 3] == [raised, raised, f"{mine} {[heard]}"]
    assert said[9:11] == ["SystemExit: fault of 0"] * 2
