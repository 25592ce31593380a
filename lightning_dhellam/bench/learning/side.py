"""One precision learns, from where it has stopped the last time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.bench.learning.settings import PRECISIONS, Settings
from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.checkpoint.folder import load_common
from lightning_dhellam.data import IndexedDataModule
from lightning_dhellam.files import save_text
from lightning_dhellam.optimizing import Schedule, decay_groups
from lightning_dhellam.runner import Runner

_CLIP = 1.0


@dataclass
class Curve:
    """What a precision has learned so far.

    Attributes:
        lesson: Settings that decide what is learned.
        losses: The training loss of each step.
        validation: Pairs of a number of steps and the validation loss after them.
        skipped: Steps that were left out because something was not finite.
        seconds: The time of the steps, without validation.
    """

    lesson: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0

    @classmethod
    def load(cls, file: Path, lesson: dict[str, Any]) -> Curve:
        """The curve in `file`, if it is of this lesson; otherwise an empty one."""
        if file.exists():
            found = cls(**json.loads(file.read_text()))
            if found.lesson == lesson:
                return found
        return cls(lesson)

    def save(self, file: Path) -> None:
        """Write it, whole or not at all."""
        save_text(file, json.dumps(asdict(self)) + "\n")

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to learn."""
        return len(self.losses) >= self.lesson["steps"]


def learn(
    settings: Settings, name: str, data: Path, folder: Path, device: torch.device, budget: Budget
) -> Curve:
    """Learn in the precision `name` until all steps are done, or the budget is spent.

    Args:
        settings: Of the benchmark.
        name: Of the precision.
        data: The text, prepared.
        folder: For the curve and the state to go on from.
        device: That computes.
        budget: Of the benchmark.
    """
    file, state = folder / f"{name}.json", folder / f"{name}.ckpt"
    curve = Curve.load(file, settings.lesson)
    if curve.is_whole:
        return curve
    text = IndexedDataModule(
        data,
        settings.sequence_length,
        settings.batch_size,
        seed=settings.seed,
        num_workers=0,
        train_samples=settings.steps * settings.batch_size,
    )
    text.setup()
    kernels = {"fp8": "reference"} if device.type == "cpu" else {}
    with Runner.create(
        settings.config,
        device,
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        kernels=kernels | (settings.kernels or {}),
        **PRECISIONS[name],
    ) as runner:
        groups = decay_groups(runner.model, 0.1)
        adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        optimizer = runner.optimizer(adamw)
        curve = _taken_up(runner, state, settings.lesson)
        pupil = _Pupil(settings, name, runner, text, curve)
        for ended in pupil.learn():
            late = budget.left == 0
            kept = settings.save_every and ended % settings.save_every == 0
            if late or (kept and not curve.is_whole):
                pupil.settle()
                runner.save(state, {"curve": asdict(curve)})
            if late or ended % settings.evaluate_every == 0 or curve.is_whole:
                curve.save(file)
            if late and not curve.is_whole:
                break
        assert optimizer.steps == len(curve.losses)
    return curve


def _taken_up(runner: Runner, state: Path, lesson: dict[str, Any]) -> Curve:
    """Bring the runner to where `state` is, if that is of this lesson; otherwise remove it."""
    if state.exists():
        known = load_common(state)["extra"]["curve"]  # before any weight is read
        if known["lesson"] == lesson:
            return Curve(**runner.load(state)["curve"])
        shutil.rmtree(state)
    return Curve(lesson)


class _Pupil:
    def __init__(
        self, settings: Settings, name: str, runner: Runner, text: IndexedDataModule, curve: Curve
    ) -> None:
        self._settings = settings
        self._name = name
        self._runner = runner
        self._text = text
        self._curve = curve
        self._schedule = Schedule("cosine", settings.warmup_steps, 0.1)
        self._late: list[Tensor] = []
        self._skipped = curve.skipped

    def learn(self) -> Iterator[int]:
        """Do the steps that are left; yields how many are done whenever the host knows all."""
        settings, curve = self._settings, self._curve
        optimizer = self._runner.stepped
        first = len(curve.losses)
        loader = self._text.train_dataloader()
        loader.load_state_dict({"samples": first * settings.batch_size})
        stop, begin = self._stops(), time.perf_counter()
        for step, batch in zip(range(first, settings.steps), loader, strict=False):
            rate = settings.learning_rate * self._schedule.factor(step, settings.steps)
            for group in optimizer.inner.param_groups:
                group["lr"] = rate
            self._late.append(self._runner.train(batch).detach().clone())
            optimizer.clip_by_norm(_CLIP)
            optimizer.step()
            done = step + 1
            if done not in stop:
                continue
            self.settle()
            curve.seconds += time.perf_counter() - begin
            if done % settings.evaluate_every == 0 or done == settings.steps:
                curve.validation.append((done, self._validate()))
                self._tell(done)
            yield done
            begin = time.perf_counter()

    def settle(self) -> None:
        """Have the losses of all steps so far on the host."""
        self._curve.losses += [float(loss) for loss in self._late]
        self._late.clear()
        self._runner.settle()
        self._curve.skipped = self._skipped + self._runner.skipped_steps

    def _stops(self) -> set[int]:
        """After how many steps the host looks: also every few, at what is left of the budget."""
        total = self._settings.steps
        each = {self._settings.evaluate_every, self._settings.save_every or total, _LOOK}
        return {total, *(done for one in each for done in range(one, total, one))}

    def _validate(self) -> float:
        loader: Iterable[Any] = self._text.val_dataloader()
        total, samples = 0.0, 0
        for batch in loader:
            count = len(batch["tokens"])
            total += float(self._runner.evaluate(batch)) * count
            samples += count
        return total / samples

    def _tell(self, done: int) -> None:
        curve, settings = self._curve, self._settings
        rate = done * settings.batch_size * settings.sequence_length / max(curve.seconds, 1e-9)
        print(
            f"  {self._name}: step {done} of {settings.steps}, loss {curve.losses[-1]:.4f},"
            f" validation {curve.validation[-1][1]:.4f}, {rate:,.0f} tokens/s",
            flush=True,
        )


_LOOK = 50
"""Steps between two looks at the clock: for each the host waits for the device."""
