"""Kills a rank of a training job at a random moment, and lets the job go on as a cluster would.

A moment is an event of the rank: a step's batch or gradients, the copying of what is saved, or an
operation on a file or folder of the run, which is about to happen: opening, writing, renaming,
removing. So no moment depends on how fast the machine is, and the same seed draws the same ones.

    python -m tests.checkpoint.kills --kills 20     # on 4 processes, in several sizes
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam.checkpoint.staging import Staging
from tests.ranks import run_ranks, run_until_ended
from tests.strategy.runs import Losses, Model, join, loader, make_trainer

STEPS = 5
_PATIENCE = 300.0
"""Seconds after which a job hangs, on however slow a machine."""
_FILES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "ctypes.dlopen")
"""What Python tells of before it happens; exchanging two names begins with the last."""
SIZES: dict[str, dict[str, Any]] = {
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "dp": {"distributed_optimizer": True},
    "cp": {"context_parallel_size": 2},
}


class Kill(NamedTuple):
    """Which rank is killed, and at which of its events. Never, if that is None."""

    rank: int
    event: int | None


class Events(Callback):
    """Counts the events of this rank, and kills it at one of them.

    Args:
        folder: of the run.
        last: the event at which it is killed; None for never.
    """

    def __init__(self, folder: Path, last: int | None) -> None:
        self.count, self._last, self._folder = 0, last, str(folder)
        sys.addaudithook(self._hear)
        copy = Staging.copy

        def stage(*arguments: Any) -> Any:
            self.happens()
            return copy(*arguments)

        Staging.copy = stage  # type: ignore[method-assign]

    def happens(self) -> None:
        """One more."""
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        # What is removed in an open folder has no path. Elsewhere files are only read.
        if event in _FILES and (event != "open" or self._folder in str(arguments[0])):
            self.happens()

    def on_train_batch_start(self, *_: Any) -> None:
        self.happens()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.happens()


Outcome = tuple[list[float], list[float]]
"""Losses of all steps that were done, and sums of all weights in the end."""


def _train(rank: int, world: int, sizes: dict[str, Any], folder: Path, kill: Kill) -> Any:
    """Train from the newest checkpoint, if there is one: the outcome and how many events."""
    join(rank, world)
    keep = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=1,
        monitor="train_loss",
        save_top_k=2,
        save_last="link",
    )
    losses = Losses()
    events = Events(folder, kill.event if kill.rank == rank else None)
    trainer = make_trainer(
        sizes, [losses, events, keep], max_steps=STEPS, enable_checkpointing=True
    )
    module = Model(hidden_dropout=0.1)
    trainer.fit(module, loader(sizes), ckpt_path="last")
    return losses.values, [p.double().sum().item() for p in module.parameters()], events.count


def train(world: int, sizes: dict[str, Any], folder: Path) -> tuple[list[Outcome], list[int]]:
    """Train to the end: of each rank the outcome, and how many events there were."""
    found = run_ranks(world, _train, world, sizes, folder, Kill(0, None), timeout=_PATIENCE)
    return [(losses, weights) for losses, weights, _ in found], [count for *_, count in found]


def train_and_kill(world: int, sizes: dict[str, Any], folder: Path, kill: Kill) -> bool:
    """Train until a rank is killed; whether it was. The others end as they do without it."""
    ends = run_until_ended(world, _train, world, sizes, folder, kill, timeout=_PATIENCE)
    return ends[kill.rank] == -signal.SIGKILL


def goes_on(
    world: int, sizes: dict[str, Any], folder: Path, kill: Kill, never: list[Outcome]
) -> str:
    """Kill, go on, and say what differs from the run that was never killed; nothing if it is it."""
    try:
        if not train_and_kill(world, sizes, folder, kill):
            return "the rank was not killed"
    except TimeoutError as error:
        return str(error)
    outcomes, _ = train(world, sizes, folder)
    for rank, ((losses, weights), (all_losses, last)) in enumerate(
        zip(outcomes, never, strict=True)
    ):
        if losses != all_losses[STEPS - len(losses) :]:
            return f"rank {rank} has losses {losses} and not {all_losses}"
        if weights != last:
            return f"rank {rank} has other weights"
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return f"{hidden} stay" if hidden else ""


def draw(generator: random.Random, counts: list[int]) -> Kill:
    """A rank and one of its events."""
    rank = generator.randrange(len(counts))
    return Kill(rank, generator.randrange(counts[rank]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generator, good = random.Random(given.seed), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        runs: dict[str, tuple[dict[str, Any], list[Outcome], list[int]]] = {}
        for number in range(given.kills):
            beside = number // len(SIZES) % 2 == 0
            name = [*SIZES][number % len(SIZES)] + (" beside" if beside else "")
            if name not in runs:
                sizes = {**SIZES[name.split()[0]], "async_checkpoint": beside}
                runs[name] = (sizes, *train(given.processes, sizes, Path(root) / name))
            sizes, never, counts = runs[name]
            kill = draw(generator, counts)
            folder = Path(root) / f"{number}"
            wrong = goes_on(given.processes, sizes, folder, kill, never)
            good += not wrong
            of = counts[kill.rank]
            place = f"{name}: rank {kill.rank} at event {kill.event} of {of}"
            print(f"{place}: {wrong or 'goes on'}", flush=True)
    print(f"{good} of {given.kills} go on as if nobody had been killed")
    return int(good != given.kills)


if __name__ == "__main__":
    sys.exit(main())
