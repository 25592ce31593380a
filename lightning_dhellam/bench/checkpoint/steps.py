"""Steps of a training that saves: at once, and beside the steps that follow."""

from __future__ import annotations

import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.bench.checkpoint.settings import Settings
from lightning_dhellam.bench.report import Row
from lightning_dhellam.bench.throughput.settings import Case
from lightning_dhellam.checkpoint import Prepared, background, write
from lightning_dhellam.models import parameter_count
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.strategy import DHellamStrategy

FIRST, BESIDE, AT_ONCE = WAYS = ("beside, the first", "beside", "at once")
"""The first one beside training takes and pins the host memory that later ones take again; it is
not written, which would tell no more: it has no time until it is whole, and none meanwhile."""
_WARM_UP = 2


def measure_steps(
    settings: Settings, place: Path, device: torch.device, tell: Callable[[Row], None]
) -> None:
    """Train on `device`, and save in `place` in each way. `tell` is called with each way's row.

    Of each: the median of steps that nothing disturbs (`normal ms`), the step that saves, the one
    after it, those while it is written (a median), from the call until the checkpoint has its name
    (`whole s`), and how much more memory of the host the process had than before, at most, by the
    bytes that the device holds of what is saved.
    """
    case = Case.parse(settings.case)
    watch = _Watch(device, settings.steps, place, parameter_count(case.config), tell)
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1,
        precision="bf16-mixed",
        strategy=DHellamStrategy(micro_batch_size=1, async_checkpoint=True),
        max_steps=-1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(_Trained(case), DataLoader(_Batches(case), batch_size=None))
    finally:
        background.write = write


class _Trained(DualStrandMixin):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model_config = case.config

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class _Batches(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The same batch without end."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(3)
        size = (case.micro_batches, case.length + 1)
        tokens = torch.randint(0, case.config.vocab_size, size, generator=generator)
        self.batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch


class _Watch(pl.Callback):
    """Marks where each step begins on the device, and saves when it is time.

    Nothing here waits for what the device is about to do while steps are timed.
    """

    def __init__(
        self,
        device: torch.device,
        steps: int,
        place: Path,
        parameters: int,
        tell: Callable[[Row], None],
    ) -> None:
        self.device, self.steps, self.place = device, steps, place
        self.parameters, self.tell = parameters, tell
        self.marks: list[Any] = []
        self.quiet_since = _WARM_UP
        self.waiting = list(WAYS)
        self.saved: dict[str, Any] | None = None
        self.size = 0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        print("the model is there: training begins", flush=True)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DHellamStrategy)
        saved, step = self.saved, len(self.marks)
        if saved and saved["ended"] is None and strategy._in_flight() is None:
            self._end(saved, step)
        self.marks.append(_mark(self.device))
        # The step after the end is over, and the device is at work on the next one.
        if saved and saved["ended"] is not None and step == saved["ended"] + 2:
            self.tell(self._row(saved))
            self.saved, self.quiet_since = None, step + 1
            trainer.should_stop = not self.waiting

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = len(self.marks) - 1
        if self.saved is None and self.waiting and step - self.quiet_since >= self.steps:
            self._save(trainer, self.waiting.pop(0), step)

    def _save(self, trainer: pl.Trainer, way: str, step: int) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DHellamStrategy)
        path = self.place / f"{len(self.waiting)}.ckpt"
        _reset_peak()
        self.saved = {
            "way": way,
            "step": step,
            "normal": range(self.quiet_since, step),
            "ended": None,
            "path": path,
            "begin": time.perf_counter(),
            "memory": _memory("VmRSS"),
        }
        print(f"saving {way}, in step {step}", flush=True)
        if way == AT_ONCE:
            with strategy.saving_at_once():
                trainer.save_checkpoint(path)
            self._end(self.saved, step + 1)
        else:
            if way == FIRST:
                background.write = _write_nothing
            trainer.save_checkpoint(path)
            assert strategy._background is not None
            self.size = strategy._background._staging.size

    def _end(self, saved: dict[str, Any], step: int) -> None:
        saved |= {"ended": step, "whole": time.perf_counter() - saved["begin"]}
        saved["memory"] = _memory("VmHWM") - saved["memory"]
        background.write = write
        if saved["path"].exists():
            shutil.rmtree(saved["path"])

    def _row(self, saved: dict[str, Any]) -> Row:
        taken = _between(self.marks, saved["ended"] + 1, self.device)
        usual = median(taken[i] for i in saved["normal"])
        written = saved["way"] != FIRST
        meanwhile = median(taken[saved["step"] + 1 : saved["ended"] + 1])
        return {
            "way": saved["way"],
            "parameters": self.parameters,
            "GB": self.size / 1e9,
            "normal ms": usual,
            "saves ms": taken[saved["step"]],
            "ratio": taken[saved["step"]] / usual,
            "next ms": taken[saved["step"] + 1],
            "meanwhile ms": meanwhile if written else None,
            "whole s": saved["whole"] if written else None,
            "host memory": saved["memory"] / self.size,
        }


def _write_nothing(prepared: Prepared, group: Any) -> None:
    """In place of `write`."""


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: list[Any], last: int, device: torch.device) -> list[float]:
    """Milliseconds from each mark to the next, up to the one of number `last`."""
    known = marks[: last + 1]
    if device.type != "cuda":
        return [1e3 * (b - a) for a, b in pairwise(known)]
    known[-1].synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(known)]


def _memory(field: str) -> int:
    """Bytes that this process has (`VmRSS`) or has had at most (`VmHWM`); 0 where it is unknown."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s*(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then the peak is that of the whole process
