"""Ranks share out the bytes of a checkpoint's files, and together find any that was changed."""

from __future__ import annotations

import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from lightning_dhellam.checkpoint import checksums, folder, newest
from lightning_dhellam.checkpoint.checksums import checksum, combined, crc32, share_of
from lightning_dhellam.checkpoint.description import FILES, read_topology, save_description
from lightning_dhellam.checkpoint.folder import check_whole
from lightning_dhellam.parallel import Topology, collectives
from tests.ranks import run_ranks

RANKS = 3
SIZES = {"a": 1000, "b": 0, "c": 1, "d": 7777, "e": 256}


@pytest.mark.parametrize("cut", [0, 1, 255, 256, 70_000, 99_999, 100_000])
def test_checksums_of_parts_make_that_of_the_whole(cut: int) -> None:
    data = Random(cut).randbytes(100_000)
    first, second = data[:cut], data[cut:]
    found = combined(zlib.crc32(first), zlib.crc32(second), len(second))
    assert found == crc32(data, 0) == zlib.crc32(data)


def test_the_fast_library_sums_as_zlib_does() -> None:
    fast = pytest.importorskip("zlib_ng.zlib_ng").crc32
    assert crc32 is fast
    data = Random(1).randbytes(100_001)
    for start in range(17):
        for size in (0, 1, 15, 64, 4097, 99_000):
            part = memoryview(data)[start : start + size]
            assert fast(part, start) == zlib.crc32(part, start)


def test_without_the_fast_library_sums_are_slow_and_one_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    with pytest.warns(UserWarning, match="zlib-ng cannot be imported .*: pip install zlib-ng"):
        assert checksums._find_crc32() is zlib.crc32


@pytest.mark.parametrize("ranks", [1, 2, RANKS, 7, 20_000])
def test_each_byte_is_of_one_rank(ranks: int) -> None:
    files = {name: (size, "") for name, size in SIZES.items()}
    shares = [list(share_of(files, rank, ranks)) for rank in range(ranks)]
    found = sorted(part for share in shares for part in share)
    for name, size in SIZES.items():
        at = 0
        for _, start, count in (part for part in found if part[0] == name):
            assert start == at
            at += count
        assert at == size and any(part[0] == name for part in found)
    counts = [sum(count for _, _, count in share) for share in shares]
    assert max(counts) - min(counts) <= 1


def _flip(place: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[place] ^= 16
        file.write_bytes(data)

    return damage


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    **{f"d at {n}": ("d", _flip(n), "d is damaged: its checksum") for n in (0, 2000, 4500, 7776)},
    "c": ("c", _flip(0), "c is damaged: its checksum"),
    "cut": (
        "d",
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        "d is damaged: it has 7776",
    ),
    "longer": ("b", lambda file: file.write_bytes(b"x"), "b is damaged: it has 1 bytes"),
    "missing": ("a", Path.unlink, "has no a:"),
    "empty one missing": ("b", Path.unlink, "has no b:"),
    "description": ("topology.json", _flip(40), r"topology\.json"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two that are whole, and one of each damage."""
    folder = tmp_path_factory.mktemp("damaged")
    whole = folder / "whole"
    whole.mkdir()
    for name, size in SIZES.items():
        (whole / name).write_bytes(Random(size).randbytes(size))
    known = {FILES: {name: checksum(whole / name) for name in SIZES}, "optimizer": "AdamW"}
    save_description(whole, known)
    for place, (name, damage, _) in DAMAGE.items():
        damage(shutil.copytree(whole, folder / place) / name)
    for name in ("second", "third"):
        shutil.copytree(whole, folder / name)
    return folder


@pytest.fixture(scope="module")
def of_ranks(checkpoints: Path) -> list[Any]:
    return run_ranks(RANKS, _of_rank, checkpoints)


@pytest.fixture(scope="module")
def refusals(of_ranks: list[Any]) -> list[dict[str, str]]:
    """What each rank says of each damage, and of none."""
    return [refused for refused, _ in of_ranks]


def _of_rank(rank: int, checkpoints: Path) -> Any:
    context: Any = SimpleNamespace(
        world_group=dist.group.WORLD, topology=Topology(world_size=RANKS, rank=rank)
    )
    refused = {path.name: _refusal(path, context) for path in sorted(checkpoints.iterdir())}
    # The first was replaced between two reads, and the second of those that are whole after one.
    paths = [checkpoints / name for name in ("whole", "missing", "second", "third")]
    with (
        mock.patch.object(folder, "read_topology", _another if rank == 1 else read_topology),
        mock.patch.object(newest, "holds_state", lambda path: path != paths[2] or rank != 2),
    ):
        refused["replaced"] = _refusal(paths[0], context)
        return refused, newest.newest_whole(paths, context, training=True)


def _another(path: Path) -> dict[str, Any]:
    """What a rank reads of a checkpoint: of the first what another one says."""
    known = read_topology(path)
    if path.name == "whole":
        known[FILES]["e"] = [SIZES["e"], "0" * 8]
    return known


def _refusal(path: Path, context: Any) -> str:
    checksums.AT_ONCE = 1000  # so that a part takes several reads
    try:
        check_whole(path, context)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("place", DAMAGE)
def test_all_ranks_refuse_what_is_damaged_by_name(place: str, refusals: Any) -> None:
    said = [of_rank[place] for of_rank in refusals]
    assert all(re.search(DAMAGE[place][2], text) and "\n" not in text for text in said), said


def test_what_is_whole_is_taken(refusals: list[dict[str, str]]) -> None:
    assert [of_rank["whole"] for of_rank in refusals] == [""] * RANKS


def test_what_ranks_know_different_things_of_is_refused_by_all(
    of_ranks: list[Any], checkpoints: Path
) -> None:
    said = {refused["replaced"] for refused, _ in of_ranks}
    assert len(said) == 1 and "rank 1 has read another topology.json than rank 0" in str(said)
    assert [found for _, (found, _) in of_ranks] == [checkpoints / "third"] * RANKS
    (first, second, third), *others = (refused for _, (_, refused) in of_ranks)
    assert all(other == [first, second, third] for other in others)
    assert first.startswith(f"checkpoint {checkpoints}/whole is not the same for all ranks")
    assert second.endswith("missing has no a")
    assert third == f"checkpoint {checkpoints}/second holds weights only"


def test_one_process_reads_all_of_a_checkpoint_on_an_emulated_cluster(checkpoints: Path) -> None:
    context: Any = SimpleNamespace(
        world_group=None, topology=Topology(world_size=4, rank=3, tp_size=4)
    )
    assert _refusal(checkpoints / "whole", context) == ""
    assert "d is damaged: its checksum" in _refusal(checkpoints / "d at 0", context)


def test_a_lost_rank_is_no_fault_of_a_checkpoint(checkpoints: Path) -> None:
    context: Any = SimpleNamespace(world_group=None, topology=Topology(world_size=1))
    lost = mock.Mock(side_effect=RuntimeError("Connection closed by peer"))
    paths = [checkpoints / "whole", checkpoints / "second"]
    with (
        mock.patch.object(collectives, "of_all_ranks", lost),
        pytest.raises(RuntimeError, match="Connection closed by peer"),
    ):
        newest.newest_whole(paths, context, training=True)
    assert lost.call_count == 1  # nothing goes on with ranks of which one is gone
