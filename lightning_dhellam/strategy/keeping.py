"""What a ModelCheckpoint does around a save: links, removals, and looking whether a name is taken.

Lightning does these at once. Here they wait for the checkpoint that is in flight: a link never
names what is not there yet, and what it replaces stays until it is. A link is replaced in one step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam.files import put_in_place
from lightning_dhellam.leftovers import name_digest
from lightning_dhellam.remote import Folder, place_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

_LINK, _EXISTS = "_link_checkpoint", "file_exists"


class Keeping:
    """Stands in for what the ModelCheckpoints of a trainer do to the file system.

    Args:
        trainer: whose they are.
        then: does something once what is in flight has its name, or at once.
        in_flight: what that is.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        then: Callable[[Callable[[], None]], None],
        in_flight: Callable[[], Folder | None],
    ) -> None:
        self._then = then
        self._in_flight = in_flight
        callbacks = getattr(trainer, "callbacks", ())
        self._keeps = [one for one in callbacks if isinstance(one, ModelCheckpoint)]
        for one in self._keeps:
            setattr(one, _LINK, self._link)
            setattr(one, _EXISTS, self._look_with(one))

    def close(self) -> None:
        """Let Lightning do it again."""
        for one in self._keeps:
            for name in (_LINK, _EXISTS):
                one.__dict__.pop(name, None)

    def _link(self, trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            self._then(lambda: link(Path(filepath), Path(linkpath)))
        if self._in_flight() is None:  # otherwise it is there later, and nobody waits for that
            trainer.strategy.barrier()

    def _look_with(self, keep: ModelCheckpoint) -> Callable[[Any, pl.Trainer], bool]:
        def exists(path: Any, trainer: pl.Trainer) -> bool:
            return place_of(path) == self._in_flight() or ModelCheckpoint.file_exists(
                keep, path, trainer
            )

        return exists


def link(path: Path, name: Path) -> None:
    """Let a name stand for a path, relative to where the name is; what had it is gone.

    If there is nothing at the path, because it was not saved, the name stays as it is.
    """
    if not path.exists():
        return
    partial = name.with_name(f".{name_digest(name)}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(path, name.parent), target_is_directory=True)
    put_in_place(partial, name)
