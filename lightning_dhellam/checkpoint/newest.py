"""Of several checkpoints the newest that is whole: what a run goes on from after a fault."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.checkpoint.description import holds_state
from lightning_dhellam.checkpoint.folder import fault_of
from lightning_dhellam.parallel.collectives import of_all_ranks, together
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.remote import Folder

_RANK = re.compile(r"rank \d+: \w+: ")
"""What a failure of another rank begins with."""


def newest_whole(
    paths: Sequence[Folder], context: ParallelContext, *, training: bool
) -> tuple[Folder, list[str]]:
    """The first of some checkpoints that is whole, and what is wrong with those before it.

    Every rank must call this, with the same paths. Each file is read once, by one rank.

    Args:
        paths: of the folders, the newest first. The first is what was asked for.
        context: groups of this rank.
        training: whether it is to go on training: then those after the first that hold weights
            only are passed over.

    Raises:
        ValueError: on every rank: none of them is whole.
    """
    refused: list[str] = []
    group = context.world_group
    for path in paths:
        fault = fault_of(path, context)
        if fault is not None:
            refused.append(_reason(str(fault)))
            continue
        if path is paths[0] or not training:
            return path, refused
        holds = together(partial(holds_state, path), group)
        if all(of_all_ranks(holds, group)):  # it may have been replaced since
            return path, refused
        refused.append(f"checkpoint {path} holds weights only")
    none = "" if len(paths) == 1 else f", and none of {len(paths) - 1} others there is whole"
    raise ValueError(
        f"{refused[0]}{none}: start a new run, without ckpt_path, or give the path of another"
        " checkpoint"
    )


def _reason(text: str) -> str:
    """What a failure says, without its rank and kind, and without what one is to do."""
    return _RANK.sub("", text).removesuffix(f": {REMEDY}").removesuffix(f", {REMEDY}")
