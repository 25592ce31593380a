"""What `predict` finds, in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from lightning_dhellam.files import local_path, save_text
from lightning_dhellam.hosted import RunnerStrategy


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict_step` returns into a file of JSON lines, in the order of the data.

    A line is `{"sample": 3, "prediction": [...]}`, with `"loader"` where there are several; of a
    batch whose prediction has no row for each sample it is `{"batch": 0, ...}`. What was predicted
    is there once, however many ranks there are.

    Args:
        file: to be written; `predictions.jsonl` beside the logs if it is left out.
    """

    def __init__(self, file: str | None = None) -> None:
        super().__init__("batch")
        self.file = file
        self._part: IO[str] | None = None
        self._path = Path()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: every rank asks
        self._path = local_path(self.file or os.path.join(folder, "predictions.jsonl"))
        if not _is_first_of_model(trainer):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._part_of(_share(trainer)[1]).open("w")

    def _part_of(self, replica: int) -> Path:
        return self._path.with_name(f".{self._path.name}.part-{replica:05d}")

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if self._part is None or prediction is None:
            return
        samples = batch_indices or ()
        rows = apply_to_collection(prediction, Tensor, Tensor.tolist)
        if isinstance(rows, list) and len(rows) == len(samples):
            found = [({"sample": sample}, row) for sample, row in zip(samples, rows, strict=True)]
        else:
            replicas, replica = _share(trainer)
            found = [({"batch": batch_idx * replicas + replica}, rows)]
        for place, row in found:
            line = json.dumps({"loader": dataloader_idx, **place, "prediction": row}, default=str)
            self._part.write(line + "\n")

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part_of(replica) for replica in range(_share(trainer)[0])]
            count = _join(parts, self._path)
            rank_zero_info(f"predictions: {self._path} ({count} lines)")
        trainer.strategy.barrier()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._part is not None:
            self._part.close()
            Path(self._part.name).unlink(missing_ok=True)
            self._part = None


def _join(parts: list[Path], path: Path) -> int:
    """Make one file of the parts, each place in it once. How many lines it has."""
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise ValueError(
            f"{missing[0]} is not there: another node has written it where this one does not see"
            " it; use a folder that all nodes see"
        )
    lines: dict[tuple[int, bool, int], dict[str, Any]] = {}
    for part in parts:
        with part.open() as file:
            for line in map(json.loads, file):
                # A sampler repeats samples until every rank has as many.
                place = line["loader"], "batch" in line, line.get("sample", line.get("batch"))
                lines.setdefault(place, line)
    several = any(loader for loader, *_ in lines)
    text = []
    for place in sorted(lines):
        line = lines[place]
        text.append(json.dumps(line if several else {k: line[k] for k in line if k != "loader"}))
    save_text(path, "".join(line + "\n" for line in text))
    for part in parts:
        part.unlink()
    return len(text)


def _share(trainer: pl.Trainer) -> tuple[int, int]:
    """How many ranks get samples of their own, and which of them this one is."""
    dealt = trainer.distributed_sampler_kwargs
    return (dealt["num_replicas"], dealt["rank"]) if dealt else (1, 0)


def _is_first_of_model(trainer: pl.Trainer) -> bool:
    """Whether this rank speaks for those that share its samples, and have the same."""
    if not isinstance(trainer.strategy, RunnerStrategy):
        return True
    topology = trainer.strategy.place().context.topology
    return topology.tp_rank == topology.cp_rank == topology.pp_rank == 0
