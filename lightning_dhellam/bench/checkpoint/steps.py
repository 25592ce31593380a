"""Steps of a training that saves: at once, and beside the steps that follow."""

from __future__ import annotations

import re
import shutil
import time
import warnings
from collections.abc import Iterator
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
from lightning_dhellam.models import parameter_count
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.strategy import DHellamStrategy

AT_ONCE, FIRST, BESIDE = "at once", "beside, the first", "beside"
WAYS = (AT_ONCE, FIRST, BESIDE)
"""The first one beside training takes and pins the host memory that later ones take again."""
_WARM_UP = 2


def measure_steps(settings: Settings, place: Path, device: torch.device) -> list[Row]:
    """Train on `device`, and save in `place` in each way. A row for each way.

    Of each: the median of steps that nothing disturbs (`normal ms`), the step that saves, the one
    after it, those while it is written (a median), from the call until the checkpoint has its name
    (`whole s`), and how much more memory of the host the process had than before, at most, by the
    bytes of the checkpoint.
    """
    case = Case.parse(settings.case)
    watch = _Watch(device, settings.steps, place)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(_Trained(case), DataLoader(_Batches(case), batch_size=None))
    return watch.rows(parameter_count(case.config))


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

    Nothing here waits for the device while steps are timed.
    """

    def __init__(self, device: torch.device, steps: int, place: Path) -> None:
        self.device, self.steps, self.place = device, steps, place
        self.marks: list[Any] = []
        self.saved: list[dict[str, Any]] = []
        self.normal = _WARM_UP

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DHellamStrategy)
        if self.saved and self.saved[-1]["ended"] is None and strategy._in_flight() is None:
            self._end(len(self.marks))
        self.marks.append(_mark(self.device))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        step = len(self.marks) - 1
        last = self.saved[-1] if self.saved else None
        if last is not None and last["ended"] is None:
            return
        quiet_since = _WARM_UP if last is None else last["ended"] + 1
        if step - quiet_since < self.steps:
            return
        if len(self.saved) == len(WAYS):
            trainer.should_stop = True
            return
        self._save(trainer, WAYS[len(self.saved)], step, range(quiet_since, step))

    def _save(self, trainer: pl.Trainer, way: str, step: int, normal: range) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DHellamStrategy)
        path = self.place / f"{len(self.saved)}.ckpt"
        _reset_peak()
        self.saved.append(
            {"way": way, "step": step, "normal": normal, "ended": None, "path": path}
            | {"begin": time.perf_counter(), "memory": _memory("VmRSS")}
        )
        if way == AT_ONCE:
            with strategy.saving_at_once():
                trainer.save_checkpoint(path)
            self._end(step + 1)
        else:
            trainer.save_checkpoint(path)

    def _end(self, step: int) -> None:
        one = self.saved[-1]
        one |= {"ended": step, "whole": time.perf_counter() - one["begin"]}
        one["memory"] = _memory("VmHWM") - one["memory"]
        one["bytes"] = sum(file.stat().st_size for file in one["path"].iterdir())
        shutil.rmtree(one["path"])

    def rows(self, parameters: int) -> list[Row]:
        taken = _between(self.marks, self.device)
        return [
            {
                "way": one["way"],
                "parameters": parameters,
                "GB": one["bytes"] / 1e9,
                "normal ms": (usual := median(taken[i] for i in one["normal"])),
                "saves ms": taken[one["step"]],
                "ratio": taken[one["step"]] / usual,
                "next ms": taken[one["step"] + 1],
                "meanwhile ms": median(taken[one["step"] + 1 : one["ended"] + 1]),
                "whole s": one["whole"],
                "host memory": one["memory"] / one["bytes"],
            }
            for one in self.saved
        ]


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: list[Any], device: torch.device) -> list[float]:
    """Milliseconds from each mark to the next."""
    if device.type != "cuda":
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


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
