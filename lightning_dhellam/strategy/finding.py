"""Which checkpoint a run goes on from, where Lightning is to find it: the newest that is whole.

Lightning takes the path for good once it has found one. So it is asked here what it was asked for,
before the processes of a job know each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn

from lightning_dhellam.checkpoint.description import TOPOLOGY
from lightning_dhellam.files import local_path
from lightning_dhellam.leftovers import restore
from lightning_dhellam.remote import Folder, RemotePath, place_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

_PARSE = "_parse_ckpt_path"
_ENDING = ".ckpt"


class Finding:
    """Knows whether a run of a trainer was given a path, and where else its checkpoints are.

    Args:
        trainer: that is about to run.

    Attributes:
        by_newest: whether the run is to go on from the newest checkpoint, whatever its path.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._connector = trainer._checkpoint_connector
        self.by_newest = False
        setattr(self._connector, _PARSE, self._parse)

    def _parse(self, state_fn: TrainerFn, ckpt_path: Any, **known: Any) -> Any:
        folders = self._folders()
        for folder in folders:
            restore(folder)
        parse = getattr(type(self._connector), _PARSE)
        path = parse(self._connector, state_fn, ckpt_path, **known)
        if path is None and ckpt_path == "last":  # Lightning looks on this machine only
            path = next((str(one) for one in self._remote() if one.name.startswith("last")), None)
        if ckpt_path == "last" and state_fn is TrainerFn.FITTING:
            path = self._requeued(path)
        lost = (link for folder in folders for link in folder.glob("last*.ckpt") if _is_lost(link))
        if path is None and ckpt_path == "last":
            path = next(map(str, lost), None)
        unnamed = ckpt_path is None and state_fn is TrainerFn.FITTING
        self.by_newest = path is not None and (unnamed or ckpt_path in ("last", "hpc"))
        return path

    def _requeued(self, path: Any) -> Any:
        """What a job has saved to be requeued, if it is newer than its last checkpoint.

        Lightning takes it where no path is given alone, so that a job which asks for the last, as
        it must in case a node is lost, would do the steps since once more.
        """
        requeued = self._connector._hpc_resume_path if SLURMEnvironment.detect() else None
        if requeued is None or path is None:
            return path or requeued
        return max((str(path), requeued), key=_moment)

    def others(self, path: Folder) -> Sequence[Folder]:
        """Checkpoints of this trainer's besides `path`, the newest first."""
        if isinstance(path, RemotePath):
            return [one for one in self._remote() if one != path]
        found: dict[Path, float] = {}
        for folder in (path.parent, *self._folders()):
            for one in folder.glob(f"*{_ENDING}"):
                if one.is_dir():
                    found[one.resolve()] = one.stat().st_mtime
        found.pop(path.resolve(), None)
        return sorted(found, key=lambda one: -found[one])

    def took(self, path: Folder) -> None:
        """Let the trainer know which checkpoint it really goes on from."""
        self._connector._ckpt_path = str(path)

    def _remote(self) -> list[RemotePath]:
        """Checkpoints of the trainer's callbacks on other file systems, the newest first."""
        found: dict[RemotePath, float] = {}
        for callback in getattr(self._trainer, "callbacks", ()):
            folder = getattr(callback, "dirpath", None)
            if isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint) and folder:
                with suppress(ValueError):  # which is said when the run is checked
                    place = place_of(folder)
                    if isinstance(place, RemotePath):
                        found |= _described(place)
        return sorted(found, key=lambda one: -found[one])

    def _folders(self) -> list[Path]:
        """Where checkpoints of the trainer's callbacks and of SLURM's requeueing are."""
        trainer = self._trainer
        found: list[Any] = [trainer.default_root_dir]
        for callback in getattr(trainer, "callbacks", ()):
            if isinstance(callback, ModelCheckpoint):
                found.append(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
            elif isinstance(callback, OnExceptionCheckpoint):
                found.append(callback.dirpath)
        local = []
        for folder in dict.fromkeys(map(str, found)):
            with suppress(ValueError):  # of another file system
                local.append(local_path(folder))
        return local


def _described(folder: RemotePath) -> dict[RemotePath, float]:
    """The checkpoints of a folder that have a description, and when that was written."""
    places = [one for one in folder.iterdir() if one.name.endswith(_ENDING)]
    return {one: (one / TOPOLOGY).modified() for one in places if (one / TOPOLOGY).is_file()}


def _moment(path: str) -> float:
    """When a checkpoint was written."""
    place = place_of(path)
    if isinstance(place, RemotePath):
        described = place / TOPOLOGY
        return described.modified() if described.is_file() else 0.0
    return place.stat().st_mtime if place.exists() else 0.0


def _is_lost(link: Path) -> bool:
    """Whether what a link names is gone."""
    return link.is_symlink() and not link.exists()
