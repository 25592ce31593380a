"""Going on by itself where torchrun starts the processes of a job again (`--max-restarts`).

A job notes into which folders it saves, in a file of its own under `default_root_dir`; a later life
of it goes on from the newest whole checkpoint that it has saved there. So neither a callback nor a
path has to be told, nor are checkpoints of other jobs taken that lie in the same folder. A job that
ends well says so in its note.

A life is another one of the same job if torchrun counts it as a restart, or if the job has an id of
the user's (`--rdzv-id`), by which machines join it and leave it without such a count.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_dhellam.checkpoint import check_present, holds_state
from lightning_dhellam.files import local_path, save_text
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.strategy.launcher import StartedLauncher

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NOTES = ".restarts"
_NO_ID = ("none", "")
"""What torchrun calls jobs that have no id, all of them."""


class Life(NamedTuple):
    """One of the lives of a job that torchrun may start again.

    Attributes:
        job: its id.
        restarts: before this life.
    """

    job: str
    restarts: int

    @classmethod
    def find(cls) -> Life | None:
        """The life that this process is in; None where nothing would start the job again."""
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) < 1:
            return None
        job = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return cls(job, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))

    @property
    def is_known(self) -> bool:
        """Whether a note of this job's must be its own: others may be called the same."""
        return self.restarts > 0 or self.job not in _NO_ID


class Note:
    """What a job notes of where it saves, for its later lives.

    Args:
        root: the trainer's `default_root_dir`.
        life: of the job.
        run: number of the run in the script, the same in each life.
    """

    def __init__(self, root: Path, life: Life, run: int) -> None:
        name = hashlib.sha256(f"{life.job} {run}".encode()).hexdigest()[:16]
        self._file = root / _NOTES / f"{name}.json"
        self._job = life.job

    def add(self, folder: Path) -> None:
        """Note that checkpoints are saved into a folder, before the first is."""
        known = _read(self._file)
        folders = known.get("folders", [])
        if str(folder) in folders:
            return
        if not known:
            self._clear()
            # By the clock of the file system, as checkpoints have it.
            save_text(self._file, "{}")
            known = {"job": self._job, "begun": self._file.stat().st_mtime}
        self._write({**known, "folders": [*folders, str(folder)]})

    def end(self) -> None:
        """Note that the run has come to its end, so that no later job goes on from here."""
        known = _read(self._file)
        if known:
            self._write({**known, "ended": True})

    @property
    def has_ended(self) -> bool:
        """Whether the run has come to its end."""
        return bool(_read(self._file).get("ended"))

    def forget(self) -> None:
        """Begin anew."""
        self._file.unlink(missing_ok=True)

    def newest(self) -> Path | None:
        """The newest checkpoint with which training can go on; None if there is none.

        All its files are there, in their sizes; what is in them is compared when it is loaded. Of
        each newer one of which that is not so a line says why.
        """
        for path in self.saved():
            try:
                check_present(path)
                if holds_state(path):
                    return path
            except ValueError as error:
                rank_zero_warn(f"going on from an older checkpoint: {error}")
        return None

    def saved(self) -> list[Path]:
        """Checkpoints that the job has saved, the newest first."""
        known = _read(self._file)
        found = [place for folder in known.get("folders", ()) for place in _saved(Path(folder))]
        # What is older than the note is of another job.
        return [path for moment, path in sorted(found, reverse=True) if moment >= known["begun"]]

    def _write(self, known: dict[str, Any]) -> None:
        save_text(self._file, json.dumps(known) + "\n")

    def _clear(self) -> None:
        """Take away what other jobs have noted that are over."""
        for file in self._file.parent.glob("*.json"):
            other = _read(file)
            if other.get("ended") and other.get("job") != self._job:
                file.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(file.read_bytes())
        if isinstance(known, dict):
            return known
    return {}


def _saved(folder: Path) -> Iterator[tuple[float, Path]]:
    """When each checkpoint of a folder was saved."""
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                if not path.name.startswith("."):
                    yield (path / "topology.json").stat().st_mtime, path


class RestartingLauncher(StartedLauncher):
    """Where torchrun has started the processes: lets a later life go on from an earlier one.

    Args:
        life: of this process.
        run: gives the number that the next run has in the script.
        prepare: is given the trainer before it runs.

    Attributes:
        note: of the run that is under way.
        found: the checkpoint that it goes on from, if it does by itself.
    """

    def __init__(
        self,
        life: Life,
        run: Callable[[], int],
        prepare: Callable[[pl.Trainer], None],
    ) -> None:
        super().__init__(prepare)
        self._life = life
        self._run = run
        self.note: Note | None = None
        self.found: Path | None = None

    @override
    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: pl.Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        self.note = self.found = None
        if trainer is None or trainer.state.fn is not TrainerFn.FITTING:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        call = inspect.signature(function).bind(*args, **kwargs)
        root = local_path(trainer.default_root_dir)
        self.note = Note(root, self._life, self._run())
        over = not self._life.restarts and self.note.has_ended
        if self._life.is_known and not over:
            self.found = self._choose(call.arguments.get("ckpt_path"))
        elif int(os.environ.get("RANK", 0)) == 0:
            self.note.forget()  # of another job of that id, or of none
        if self.found is not None:
            call.arguments["ckpt_path"] = str(self.found)
        return super().launch(function, *call.args, trainer=trainer, **call.kwargs)

    def _choose(self, given: Any) -> Path | None:
        """The checkpoint to go on from, where the run was given this `ckpt_path`."""
        assert self.note is not None
        chosen = given is not None and given != "last"
        if chosen and not self._life.restarts:
            return None
        found = self.note.newest()
        if found is not None:
            instead = f", not from ckpt_path={given}, from which it began" if chosen else ""
            rank_zero_info(
                f"restart {self._life.restarts} of the job: going on from {found}{instead}"
            )
        return found

    def check_agreed(self, group: dist.ProcessGroup | None) -> None:
        """Refuse that some ranks go on and others begin. Every rank must call this.

        Raises:
            ValueError: on every rank, when one of them does not see the checkpoint of the others.
        """
        found = of_all_ranks(self.found, group)
        if None in found and any(found):
            path = next(path for path in found if path is not None)
            raise ValueError(
                f"rank {found.index(None)} does not see {path}, from which other ranks go on: save"
                " on a file system that all nodes see, and start again when it shows them the same"
            )

    def others(self, path: Path) -> list[Path] | None:
        """Older checkpoints of the job, the newest first, if it goes on from `path` by itself."""
        if self.note is None or path != self.found:
            return None
        saved = self.note.saved()
        return saved[saved.index(path) + 1 :] if path in saved else []


def store_of_life(timeout: timedelta) -> dict[str, Any]:
    """Where the processes of a life find each other: nothing to say where torchrun has no store.

    Torchrun's own outlives them, and so do the addresses that they have left in it: by those a
    process of the next life would look for one that is dead, or wait for it.
    """
    life = Life.find()
    if life is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"life {life.restarts}", store)}


def nodes_of_life(devices: int, num_nodes: int) -> int:
    """How many nodes a life of the job has: torchrun may have found more or fewer than before.

    Args:
        devices: of each node, by the Trainer.
        num_nodes: by the Trainer.
    """
    processes, here = (int(os.environ.get(n, 0)) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if here != devices or processes % devices:
        return num_nodes  # refused with what the job has
    found = processes // devices
    if found != num_nodes:
        rank_zero_info(f"num_nodes={found}, as torchrun has started the job, not {num_nodes}")
    return found
