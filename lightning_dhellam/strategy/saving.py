"""Lightning's hooks around checkpoints: every rank writes and reads its own part."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_dhellam import checkpoint as checkpoint_files
from lightning_dhellam.checkpoint.finite import check_finite
from lightning_dhellam.checkpoint.shares import Shares
from lightning_dhellam.files import local_path
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.parallel.collectives import together
from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.runner import Runner
from lightning_dhellam.strategy.processes import JobStrategy
from lightning_dhellam.strategy.resuming import carry_over


class SavingStrategy(JobStrategy):
    """A strategy whose checkpoints are folders that all ranks write; see `checkpoint.folder`.

    Its subclass sets the attributes.

    Attributes:
        resume_settings: whose settings win where a checkpoint and the run differ.
    """

    resume_settings: str
    _runner: Runner | None = None
    _optimizer: ModelParallelOptimizer | None = None

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def _model_config(self) -> ModelConfig:
        assert isinstance(self.lightning_module, DualStrandMixin)
        return self.lightning_module.model_config

    @property
    def _settings(self) -> dict[str, Any] | None:
        return self._runner.settings if self._runner is not None else None

    @property
    def _expert_names(self) -> ExpertNames:
        assert self.lightning_module is not None
        return ExpertNames(self.lightning_module)

    @property
    def _shares(self) -> Shares:
        assert self.lightning_module is not None
        return checkpoint_files.shares_of(self.lightning_module, self.context.topology)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder that loads with any parallel sizes; see `checkpoint.folder`.

        Raises:
            ValueError: the run is emulated, weights are not finite, or `filepath` is remote.
            OSError: a rank could not write.
        """
        if self.cluster is not None:
            raise ValueError(
                "this run is emulated (emulate=...): its numbers mean nothing, so it saves no"
                " checkpoint; use Trainer(enable_checkpointing=False)"
            )
        if storage_options is not None:
            raise ValueError(
                "storage_options is not supported: DHellamStrategy writes checkpoints itself"
            )
        if self.alone:
            warnings.warn(
                f"checkpoint {filepath} is not saved: rank {self.global_rank} alone has raised"
                f" {type(sys.exception()).__name__}, and a checkpoint is written by all ranks; go"
                " on from an earlier one",
                stacklevel=2,
            )
            return
        common = dict(checkpoint)
        weights = self._expert_names.all_of(common.pop("state_dict"))
        with_state = common.pop("optimizer_states", None) is not None
        state = settings = None
        if with_state and self._optimizer is not None:
            state, settings = self._optimizer.state_dict(), self._settings
        path = local_path(self.broadcast(str(filepath)))
        assert isinstance(self.lightning_module, DualStrandMixin)
        common |= checkpoint_files.origin_of(self.lightning_module.model)
        if self._note is not None:
            self._note.add(path.parent)
        check_finite(path, self.lightning_module, self.context)
        model = checkpoint_files.described(self._model_config)
        checkpoint_files.save(
            path, self.context, common, weights, self._shares, state, settings, model
        )

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        # What was to take its place was not saved.
        if not self.alone:
            super().remove_checkpoint(filepath)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        assert self.lightning_module is not None
        path = local_path(self.broadcast(str(checkpoint_path)))
        fitting = self.lightning_module.trainer.state.fn is TrainerFn.FITTING

        def check() -> list[str]:
            return checkpoint_files.check_model(
                path, self._model_config, training=fitting, resume_settings=self.resume_settings
            )

        for line in together(check, self.context.world_group):
            rank_zero_warn(line)
        names, settings = self._expert_names, self._settings if fitting else None
        own, experts = names.split(self.lightning_module.state_dict())
        saved = checkpoint_files.load(
            path, self.context, self._shares, [*own, *experts], settings, experts
        )
        saved["state_dict"] = names.rank_of(saved["state_dict"])
        assert isinstance(self.lightning_module, DualStrandMixin)
        checkpoint_files.restore_origin(self.lightning_module.model, saved)
        return saved

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        together(lambda: self._load_weights(checkpoint, strict), self.context.world_group)
        if self._optimizer is not None:
            self._optimizer.reload()

    def _load_weights(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        assert self.lightning_module is not None
        try:
            super().load_model_state_dict(checkpoint, strict)
        except RuntimeError as error:
            # Not before: a module may take weights of other names.
            names, own = self._expert_names, self.lightning_module.state_dict()
            found = checkpoint_files.misfit(
                names.all_of(checkpoint["state_dict"]), names.all_of(own)
            )
            if found is None:
                raise
            raise ValueError(found) from error

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._optimizer is not None and self.lightning_module is not None
        if self._runner is not None:  # hooks may have unfrozen what there is state of
            self._runner.follow_model()
        trainer, optimizer = self.lightning_module.trainer, self._optimizer
        (state,) = checkpoint["optimizer_states"]

        def restore() -> tuple[list[dict[str, Any]], list[str]]:
            own = checkpoint_files.load_state(state, self.context, self._shares, optimizer.form)
            return carry_over(
                self.optimizers[0],
                [config.scheduler for config in trainer.lr_scheduler_configs],
                checkpoint["lr_schedulers"],
                optimizer.load_state_dict(own, self.resume_settings),
                self.resume_settings,
            )

        # Lightning loads them next, from this same dictionary.
        schedules, lines = together(restore, self.context.world_group)
        checkpoint["lr_schedulers"][:] = schedules
        for line in lines:
            rank_zero_warn(f"resuming: {line}")

    @override
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Nothing here: `save_checkpoint` writes what all ranks have of it."""
        return {}
