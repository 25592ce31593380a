"""Walks: visits of a stage that follow each other without a transfer between them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dhellam.pipeline.schedules.work import Visit

Walk = tuple[Visit, ...]
"""Visits that are one walk: what a strand takes through a chunk it takes on through the next."""


def walks(row: Sequence[Visit]) -> list[Walk]:
    """Return the visits of a stage as walks.

    Where the layers turn, nothing comes between a descending visit and the ascending one of the
    same micro-batches, so the two are one walk. Only its first visit receives, and only its last
    one sends.
    """
    found: list[Walk] = []
    for works in row:
        if found and _continues(found[-1][-1], works):
            found[-1] = (*found[-1], works)
        else:
            found.append((works,))
    return found


def _continues(before: Visit, works: Visit) -> bool:
    """Whether every strand of a visit goes on from the chunk that it was in."""
    ends = {(work.part, work.chunk + work.step, work.micro_batch) for work in before if work.step}
    begins = {(work.part, work.chunk, work.micro_batch) for work in works}
    return ends == begins and len(before) == len(works)
