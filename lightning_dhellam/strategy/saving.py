"""Lightning's hooks around checkpoints: every rank writes and reads its own part."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_dhellam import checkpoint as checkpoint_files
from lightning_dhellam.checkpoint.background import Background, group_beside
from lightning_dhellam.checkpoint.finite import Finiteness
from lightning_dhellam.checkpoint.shares import Shares
from lightning_dhellam.files import WriteError
from lightning_dhellam.leftovers import clear, remove
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.parallel.collectives import of_all_ranks, together
from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.remote import Folder, RemotePath, place_of
from lightning_dhellam.runner import Runner
from lightning_dhellam.strategy.finding import Finding
from lightning_dhellam.strategy.keeping import Keeping
from lightning_dhellam.strategy.processes import JobStrategy
from lightning_dhellam.strategy.resuming import carry_over, of_other_ranks

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SavingStrategy(JobStrategy):
    """A strategy whose checkpoints are folders that all ranks write; see `checkpoint.folder`.

    Its subclass sets the attributes.

    Attributes:
        resume_settings: whose settings win where a checkpoint and the run differ.
        async_checkpoint: whether checkpoints are written while training goes on.
    """

    resume_settings: str
    _runner: Runner | None = None
    _optimizer: ModelParallelOptimizer | None = None
    async_checkpoint: bool
    _finding: Finding | None = None
    _keeping: Keeping | None = None
    _background: Background | None = None
    _has_waited = False

    @override
    def prepare(self, trainer: pl.Trainer) -> None:
        self._finding = Finding(trainer)

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

        With `async_checkpoint` it is written while training goes on, one at a time.

        Raises:
            ValueError: the run is emulated, weights are not finite, or `filepath` cannot be used.
            OSError: a rank could not write, or could not write the one before.
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
        group = checkpoint_files.host_group(self.context)
        path = self._place(of_all_ranks(str(filepath), group)[0])
        self._wait_before(path)
        beside = self._background if self._trains else None
        common = dict(checkpoint)
        weights = self._expert_names.all_of(common.pop("state_dict"))
        with_state = common.pop("optimizer_states", None) is not None
        state = settings = None
        if with_state and self._optimizer is not None:
            state, settings = self._optimizer.state_dict(waits=beside is None), self._settings
        assert isinstance(self.lightning_module, DualStrandMixin)
        common |= checkpoint_files.origin_of(self.lightning_module.model)
        if self._note is not None and isinstance(path, Path):
            self._note.add(path.parent)
        prepared = checkpoint_files.prepare(
            path,
            self.context,
            common,
            weights,
            self._shares,
            state,
            settings,
            checkpoint_files.described(self._model_config),
            Finiteness(self.lightning_module),
        )
        if beside is not None:
            beside.start(prepared)
        else:
            checkpoint_files.write(prepared, group)

    def _place(self, spelt: str) -> Folder:
        return place_of(spelt, processes=self.context.processes)

    def wait_for_checkpoint(self) -> None:
        """Wait until the checkpoint that is being written is complete. Every rank must call this.

        Raises:
            OSError: a rank could not write it.
        """
        if self._background is not None:
            self._background.finish()

    @contextmanager
    def saving_at_once(self) -> Iterator[None]:
        """Inside, a checkpoint is complete when it is saved."""
        background, self._background = self._background, None
        try:
            if background is not None:
                background.finish()
            yield
        finally:
            self._background = background

    @property
    def _trains(self) -> bool:
        """Whether training goes on, so that something can be done meanwhile."""
        assert self.lightning_module is not None
        state = self.lightning_module.trainer.state
        return state.fn is TrainerFn.FITTING and state.status is TrainerStatus.RUNNING

    def _wait_before(self, path: Folder) -> None:
        """Let nothing be in flight when `path` is to be saved."""
        if self._background is None or self._background.path is None:
            return
        if not self._has_waited and self._background.path != path:
            self._has_waited = True
            rank_zero_info(
                f"checkpoint {path} waits until {self._background.path} is written, as others may:"
                " one is written at a time"
            )
        self._background.finish()

    def _open_background(self, trainer: pl.Trainer) -> None:
        """Have a run's checkpoints written as it asks. Every rank must call this."""
        if trainer.state.fn is not TrainerFn.FITTING or self.cluster is not None:
            return
        if self.async_checkpoint:
            context = self.context
            beside = group_beside(context, self.timeout)
            self._background = Background(
                context.device, context.host_group, beside, self._presence
            )
        self._keeping = Keeping(trainer, self._after_save, self._in_flight)

    def _after_save(self, action: Callable[[], None]) -> None:
        if self._background is not None:
            self._background.then(action)
        else:
            action()

    def _hold(self) -> None:
        if self._background is not None:
            self._background.hold()

    def _in_flight(self) -> Folder | None:
        return self._background.path if self._background is not None else None

    def _close_background(self) -> None:
        """Wait for what is in flight, on a rank that may be alone; a failure is said."""
        self._say_unwritten()
        if self._background is not None:
            self._background.close()
        if self._keeping is not None:
            self._keeping.close()
        self._background = self._keeping = None

    def _say_unwritten(self) -> None:
        path = self._in_flight()
        error = self._background.settle() if self._background is not None else None
        if error is not None:
            reason = f"{error}".partition("\n")[0]
            known = reason if isinstance(error, WriteError) else f"{path} was not written: {reason}"
            warnings.warn(known, stacklevel=2)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        # What was to take its place was not saved.
        if self.alone or not self.is_global_zero:
            return
        path = place_of(filepath)
        self._after_save(path.remove if isinstance(path, RemotePath) else lambda: remove(path))

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        assert self.lightning_module is not None
        self.wait_for_checkpoint()
        fitting = self.lightning_module.trainer.state.fn is TrainerFn.FITTING
        names, settings = self._expert_names, self._settings if fitting else None
        path = self._place(self.broadcast(str(checkpoint_path)))
        finding = self._finding
        others = self._of_earlier_lives(path)
        if others is None and finding is not None and finding.by_newest:
            others = finding.others(path)
        if others is not None:
            path = self._newest_whole(path, others, training=fitting)

        def check() -> list[str]:
            return checkpoint_files.check_model(
                path, self._model_config, training=fitting, resume_settings=self.resume_settings
            )

        for line in together(check, self.context.world_group):
            rank_zero_warn(line)
        own, experts = names.split(self.lightning_module.state_dict())
        saved = checkpoint_files.load(
            path,
            self.context,
            self._shares,
            [*own, *experts],
            settings,
            experts,
            checked=others is not None,
        )
        saved["state_dict"] = names.rank_of(saved["state_dict"])
        if fitting:
            self._say_of_loaders(path, saved.get("loops", {}))
        assert isinstance(self.lightning_module, DualStrandMixin)
        checkpoint_files.restore_origin(self.lightning_module.model, saved)
        return saved

    def _say_of_loaders(self, path: Folder, loops: Mapping[str, Any]) -> None:
        saved = checkpoint_files.read_topology(path) if path.is_dir() else {}
        line = of_other_ranks(loops, saved.get("data_parallel_size"), self.context.topology.dp_size)
        if line:
            rank_zero_warn(line)

    def _newest_whole(self, path: Folder, others: Sequence[Folder], *, training: bool) -> Folder:
        """The newest whole checkpoint of this run's: `path`, or else one of others.

        Raises:
            ValueError: on every rank: there is none.
        """
        if self.is_global_zero and isinstance(path, Path):
            clear(path.parent)
        paths = [path, *map(place_of, self.broadcast([str(other) for other in others]))]
        found, refused = checkpoint_files.newest_whole(paths, self.context, training=training)
        for reason in refused:
            rank_zero_warn(f"{reason}: going on from {found}, the newest that is whole")
        if refused and self._finding is not None:
            self._finding.took(found)
        return found

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
