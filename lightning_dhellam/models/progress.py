"""A bar for what takes minutes, on the first rank, where someone looks at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from lightning_dhellam.parallel.topology import Topology

Part = TypeVar("Part")


def progress(parts: Sequence[Part], what: str, topology: Topology) -> Iterator[Part]:
    """Each part in turn, with a bar of how many are done."""
    shown = topology.rank == 0 and sys.stderr.isatty()
    yield from tqdm(parts, desc=what, unit="tensor", leave=False, disable=not shown)
