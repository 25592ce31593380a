"""What a run shows of itself: the size of the model, and its progress on a terminal or in a file.

Lightning's own summary counts what one rank holds and its bar counts epochs that are not limited;
in a file each update of the bar is a line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichProgressBar
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from lightning.pytorch.utilities.model_summary.model_summary import _format_summary_table
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_dhellam.models import (
    ModelConfig,
    active_parameter_count,
    training_flops_per_token,
)
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import reduced
from lightning_dhellam.parallel.experts import is_expert
from lightning_dhellam.parallel.replicas import is_split

_UNITS = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3))


class RankSummary(ModelSummary):
    """Lightning's table of the layers, which says that it is about one rank of several."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._summarize_kwargs = {"ranks": trainer.world_size}
        super().on_fit_start(trainer, pl_module)

    @staticmethod
    @override
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Show the table without FLOPs, which nobody has counted in it."""
        rows = [(name, column) for name, column in summary_data if name != "FLOPs"]
        table = _format_summary_table(
            total_parameters,
            trainable_parameters,
            model_size,
            total_training_modes,
            total_flops,
            *rows,
        )
        lines = [line for line in table.splitlines() if not line.lower().endswith("total flops")]
        ranks = summarize_kwargs.get("ranks", 1)
        if ranks > 1:
            label = f" (rank 0 of {ranks})"
            lines = [re.sub(r"params$|\(MB\)$", rf"\g<0>{label}", line) for line in lines]
        rank_zero_info("\n" + "\n".join(lines))


class EpochBar(RichProgressBar):
    """Lightning's bar, which counts to the last epoch only where there is one."""

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        text = super()._get_train_description(current_epoch)
        return re.sub(r"/-\d+", "", text)


class ProgressLines(ProgressBar):
    """A line now and then, for output that goes to a file: every `log_every_n_steps` steps."""

    def __init__(self) -> None:
        super().__init__()
        self._on = True

    @override
    def disable(self) -> None:
        self._on = False

    @override
    def enable(self) -> None:
        self._on = True

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        done, last = trainer.global_step, trainer.max_steps
        every = getattr(trainer, "log_every_n_steps", 0) or 50  # as often as to the loggers
        if done % every and done != last:
            return
        of = f" of {last}" if last >= 0 else ""
        self._say(f"epoch {trainer.current_epoch}, step {done}{of}", trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._say(f"validated after step {trainer.global_step}", trainer, pl_module)

    def _say(self, what: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Of all ranks, since reading a metric may reduce it.
        metrics = self.get_metrics(trainer, module)
        if self._on and trainer.is_global_zero:
            print(f"{what}: {_listed(metrics)}" if metrics else what, flush=True)

    @override
    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        found = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in found.items() if name != "v_num"}


def _listed(metrics: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
    )


def displays(trainer: Mapping[str, Any]) -> list[pl.Callback]:
    """Displays that suit where the output goes, but for what a run has or does without.

    Args:
        trainer: arguments of the Trainer.
    """
    given = trainer.get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    found: list[pl.Callback] = []
    if not _has(ProgressBar, "enable_progress_bar", trainer, given):
        found.append(EpochBar() if sys.stdout.isatty() else ProgressLines())
    if not _has(ModelSummary, "enable_model_summary", trainer, given):
        found.append(RankSummary())
    return found


def _has(
    kind: type[pl.Callback], flag: str, trainer: Mapping[str, Any], given: Sequence[pl.Callback]
) -> bool:
    """Whether a run has a display of its own of some kind, or does without."""
    without = trainer.get(flag) is False or bool(trainer.get("barebones"))
    return without or any(isinstance(one, kind) for one in given)


def whole_parameters(model: nn.Module, context: ParallelContext) -> int:
    """Weights of the whole model of which this rank has a part. Every rank must call this."""
    topology = context.topology

    def shares(parameter: nn.Parameter) -> int:
        """Into how many different parts it is cut, or how many ranks have experts of their own."""
        if is_expert(parameter):
            return topology.ep_size * topology.etp_size
        return topology.tp_size if is_split(parameter) else 1

    own = sum(p.numel() * shares(p) for p in model.parameters())
    count = torch.tensor(own, device=context.device)
    return int(reduced(count, context.groups.pp, "sum"))


def size_of(model: nn.Module, config: ModelConfig, context: ParallelContext, length: int) -> str:
    """The size of a whole model in a line, whatever share of it a rank has.

    Args:
        model: this rank's part. Every rank must call this.
        config: its shape.
        context: groups and sizes of this rank.
        length: tokens of the sequences that are trained on.
    """
    own = sum(p.numel() for p in model.parameters())
    count, part = map(get_human_readable_count, (whole_parameters(model, context), own))
    topology = context.topology
    shared = topology.tp_size * topology.pp_size * topology.ep_size > 1
    share = f" ({part.strip()} of them on this rank)" if shared else ""
    if config.num_experts is not None:
        met = get_human_readable_count(active_parameter_count(config)).strip()
        share += f", of which each token meets {met}"
    frozen = getattr(model, "lora", None) is not None
    flops = training_flops_per_token(config, length, frozen=frozen)
    unit, size = next((pair for pair in _UNITS if flops >= pair[1]), _UNITS[-1])
    return (
        f"model: {count.strip()} parameters in all{share}, {flops / size:.3g} {unit} per token to"
        f" train on sequences of {length} tokens"
    )
