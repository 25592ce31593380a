"""Of several checkpoints the newest that is whole: what a run goes on from after a fault."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.checkpoint.description import holds_state
from lightning_dhellam.checkpoint.folder import check_whole
from lightning_dhellam.parallel.collectives import try_together
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.remote import Folder


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
    for path in paths:

        def check(path: Folder = path) -> None:
            check_whole(path, context)
            if training and path is not paths[0] and not holds_state(path):
                raise ValueError(f"checkpoint {path} holds weights only")

        _, failures = try_together(check, context.world_group)
        if not failures:
            return path, refused
        if failures[0].end is not None:
            raise failures[0].end
        refused.append(_reason(failures[0].text))
    none = "" if len(paths) == 1 else f", and none of {len(paths) - 1} others there is whole"
    raise ValueError(
        f"{refused[0]}{none}: start a new run, without ckpt_path, or give the path of another"
        " checkpoint"
    )


def _reason(text: str) -> str:
    """What a failure says, without its rank and kind, and without what one is to do."""
    return text.split(": ", 2)[-1].removesuffix(f": {REMEDY}").removesuffix(f", {REMEDY}")
