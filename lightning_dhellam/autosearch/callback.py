"""AutoSearch: finds the best plan in the first steps of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tqdm import tqdm
from typing_extensions import override

from lightning_dhellam.autosearch.options import MEMORY_SLACK, Options
from lightning_dhellam.autosearch.schedules import TRIED
from lightning_dhellam.autosearch.session import Session, use_unsearched
from lightning_dhellam.files import check_file, local_path
from lightning_dhellam.hosted import RunnerStrategy
from lightning_dhellam.parallel.collectives import together
from lightning_dhellam.pipeline.schedules import restored
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.report import Findings
from lightning_dhellam.values import check_kinds

_PATIENCE = 10
"""Steps in a row that may be of another size than the one that was profiled."""
_FEWEST = 1 + 2 * (len(BUILDERS) + 2)
"""Steps that a search needs at least to choose: one to profile, one round that warms up, one that
counts, of the built-in and at least two searched plans."""


class AutoSearch(Callback):
    """Profiles the operators, searches plans, measures them on real steps, installs the best.

    After the first training step the operators are timed on its values. The following steps try
    the built-in and the searched plans in turn, and the fastest is used from then on, unless it
    beats `sequential` by no more than noise. With `schedule="auto"` the best schedules of the
    pipeline are tried after that. Neither changes loss or gradients, so no step is lost. The table,
    the pictures, the profile and the plan file are written to the folder `search` of the run, and
    the numbers go to its logger.

    A checkpoint has the plan that was found: a run that goes on from it uses that plan where it
    fits. Where it does not, or where the search was not over, it searches anew.

    Args:
        rounds: steps that each of the plans is measured on.
        profile: file of a profile to use; made if it does not exist, refused if it is of another
            model, device or size. In a pipeline each stage has one, `-stage0` and so on behind
            the name.
        memory_limit: bytes that activations may take at once in a pair of layers, with those that
            communication has yet to give back; no plan that needs more is tried, but `sequential`.
            Without it, searched plans may take what that one needs and `memory_slack`.
        memory_slack: share of the memory of a step that searched plans may take on top.
        folder: where to write instead.
        replay: measure by repeating the first batch, whose gradients are thrown away, instead of
            on the steps that follow.

    Raises:
        ValueError: fewer than 1 round; a negative slack; a strategy other than DHellamStrategy; a
            profile that does not fit or could not be written; no order keeps `memory_limit`.
        BenchError: an operator could not be timed; it is named.
    """

    def __init__(
        self,
        rounds: int = 5,
        profile: str | Path | None = None,
        memory_limit: float | None = None,
        memory_slack: float = MEMORY_SLACK,
        folder: str | Path | None = None,
        replay: bool = False,
    ) -> None:
        check_kinds(AutoSearch.__init__, locals())
        if rounds < 1:
            raise ValueError(f"rounds={rounds} must be at least 1 step of each plan")
        if not memory_slack >= 0:
            raise ValueError(
                f"memory_slack={memory_slack} must be at least 0: 0.1 for a tenth more memory"
            )
        if profile and Path(profile).exists():
            Profile.load(profile)  # what it was made for is compared when that is known
        elif profile:
            check_file(Path(profile), f"profile={profile}")
        self.folder = folder
        self.replay = replay
        self._plan_file: Path | None = None
        self._options = Options(
            rounds, Path(profile) if profile else None, memory_limit, memory_slack
        )
        self._session: Session | None = None
        self._step = ExitStack()
        self._gradients_ready: Callable[[], None] = _nothing
        self._over = False
        self._again = False
        self._found: dict[str, Any] = {}
        self._loaded: dict[str, Any] = {}

    @property
    def findings(self) -> Findings | None:
        """What the search has found; None until it is over."""
        return self._session.findings if self._session is not None and self._over else None

    @property
    def over(self) -> bool:
        """Whether nothing more is measured, since the search has ended or there was none."""
        return self._over

    @property
    def plan_file(self) -> Path | None:
        """Where the plan was written to; None until it is, and where nothing could be written."""
        return self._plan_file

    @classmethod
    def of(cls, trainer: pl.Trainer) -> AutoSearch | None:
        """The one that `trainer` has."""
        return next((one for one in _callbacks(trainer) if isinstance(one, cls)), None)

    @classmethod
    def attach(cls, trainer: pl.Trainer, *, plans: bool, schedules: bool) -> None:
        """Give `trainer` one, unless it has one; before the others, which may stop training.

        Args:
            trainer: that trains.
            plans: whether plans are searched. One that the user has given searches them anyway.
            schedules: whether schedules of the pipeline are.
        """
        search = cls.of(trainer)
        if search is None:
            search = cls()
            search._options = replace(search._options, plans=plans)
            _callbacks(trainer).insert(0, search)
        search._options = replace(search._options, schedules=schedules)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, RunnerStrategy):
            raise ValueError(
                f"AutoSearch searches plans of DHellamStrategy, but the strategy is"
                f" {type(trainer.strategy).__name__}: use strategy=DHellamStrategy(...), or leave"
                " AutoSearch out"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._session = self._plan_file = None
        self._again = False
        for_its_own_sake = self.replay or self._options.profile is not None
        loaded, self._loaded, self._found = self._loaded, {}, {}
        if loaded and not for_its_own_sake and self._use(loaded, trainer):
            self._found, self._over = loaded, True
            return
        steps = trainer.estimated_stepping_batches
        self._over = steps < self._fewest and not for_its_own_sake
        _runner(trainer).is_searched = not self._over
        if self._over:
            what = "a plan" if self._options.plans else "a schedule"
            trainer.print(
                f"search: {steps:.0f} steps of training are too few to choose {what}, which takes"
                f" {self._fewest} at least: none is searched"
            )

    @property
    def _fewest(self) -> int:
        plans = _FEWEST - 1 if self._options.plans else 0
        return 1 + plans + 2 * TRIED * self._options.schedules

    @override
    def state_dict(self) -> dict[str, Any]:
        """The plan that was found, if one is: what a run that goes on need not search again."""
        return dict(self._found)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    def _use(self, loaded: Mapping[str, Any], trainer: pl.Trainer) -> bool:
        """Use the plan of a checkpoint, if it is for such a run. Every rank must call this."""
        runner = _runner(trainer)
        where = "the checkpoint's plan"
        walked: dict[str, Any] = {}

        def plans() -> PlanFile:
            found = PlanFile.of_fields(loaded["plans"], where)
            found.check(runner.agreed.conditions, where)
            if self._options.schedules and not found.schedule:
                raise ValueError("the checkpoint was made without schedule='auto'")
            walked.update(found.schedule if self._options.schedules else {})
            if walked:
                restored(walked, runner.context.topology.pp_size)
            build, layers = found.builder(), runner.engine.layers
            if runner.agreed.undecided and found.recompute:
                away = found.offload if runner.agreed.offloads else runner.agreed.offload
                layers = runner.agreed.lowered(found.recompute, away).layers
            for pair in layers:  # refuses what has changed
                build(pair.forward, pair.backward)
            return found

        try:
            found = together(plans, runner.context.world_group)
        except ValueError as error:
            trainer.print(f"search: {error}")
            return False
        if runner.agreed.undecided and found.recompute:
            runner.agreed.use_recompute(found.recompute, found.offload)
        runner.use_plan(loaded["name"], found.builder())
        by = ""
        if walked:
            runner.use_schedule(*restored(walked, runner.context.topology.pp_size))
            by = f" with schedule '{walked['name']}'"
        trainer.print(f"search: '{loaded['name']}' is used{by}, which the checkpoint has found")
        return True

    @override
    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        if self._session is not None and not self._over:
            self._gradients_ready = self._step.enter_context(self._session.step(batch))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        self._gradients_ready()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        if self._over:
            return
        self._gradients_ready = _nothing
        self._step.close()
        if self._session is None:
            self._session = self._begin(trainer, batch)
        elif self._session.skipped > _PATIENCE:
            self._begin_again(trainer, batch)
        if self.replay and not self._over:
            self._repeat(trainer, batch)
        if self._session.findings is not None and not self._over:
            self._finish(trainer, self._session.findings)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._over or self._session is None:
            return
        missing = self._session.steps_left
        self._session.stop()
        if self._session.findings is not None:
            self._finish(trainer, self._session.findings)
        else:
            trainer.print(
                f"search: training ended {missing} steps before every plan was measured, so none"
                f" was chosen: '{_runner(trainer).plan_in_use}' stays"
            )

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Not `close`, which would take the step for a good one.
        with suppress(BaseException):
            self._step.__exit__(type(exception), exception, exception.__traceback__)
        self._gradients_ready = _nothing
        self._over = True

    def _begin(self, trainer: pl.Trainer, batch: Mapping[str, Any]) -> Session:
        assert isinstance(trainer.strategy, RunnerStrategy)
        session = Session(_runner(trainer), self._options, trainer.strategy)
        with tqdm(
            desc="search: profile",
            unit="measurement",
            disable=None if trainer.is_global_zero else True,  # None: on a terminal only
        ) as bar:

            def show(done: int, total: int, label: str) -> None:
                bar.total = total
                bar.set_postfix_str(label, refresh=False)
                bar.update(done - bar.n)

            session.begin(batch, show)
        for name, peak in session.left_out.items():
            trainer.print(
                f"search: '{name}' is not tried: it needs {peak:.0f} bytes in a pair of layers, and"
                f" memory_limit={self._options.memory_limit:.0f}"
            )
        trainer.print(
            f"search: measuring {', '.join(session.candidates)} on the next"
            f" {session.steps_left} steps"
        )
        return session

    def _begin_again(self, trainer: pl.Trainer, batch: Mapping[str, Any]) -> None:
        """The batch that was profiled was not like the others: take this one, or give up."""
        assert self._session is not None
        self._session.leave()
        if not self._again:
            self._again = True
            self._session = self._begin(trainer, batch)
            return
        self._over = True
        use_unsearched(_runner(trainer))
        trainer.print(
            "search: batches differ in size from step to step, so times cannot be compared:"
            f" '{_runner(trainer).plan_in_use}' is used"
        )

    def _repeat(self, trainer: pl.Trainer, batch: Mapping[str, Any]) -> None:
        assert self._session is not None
        while self._session.findings is None:
            with self._session.step(batch) as gradients_ready:
                _runner(trainer).train(batch, step=trainer.global_step)
                gradients_ready()

    def _finish(self, trainer: pl.Trainer, findings: Findings) -> None:
        self._over = True
        self._found = {"name": findings.winner, "plans": findings.plans.fields}
        # A collective: every rank asks.
        run = self.folder or trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        files = ""
        try:
            folder = local_path(run) if self.folder else local_path(run) / "search"
            self._plan_file = findings.write(folder)
            files = f"\n  files: {folder}"
        except Exception as error:  # the plan is chosen and installed: training need not end here
            rank_zero_warn(f"search: {run} could not be written: {error}")
        for logger in trainer.loggers:
            logger.log_metrics(findings.metrics(), trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("search", f"```\n{findings}\n```")
        trainer.print(f"\n{findings}{files}")


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009  set by a connector
    return callbacks


def _runner(trainer: pl.Trainer) -> Runner:
    assert isinstance(trainer.strategy, RunnerStrategy)
    return trainer.strategy.current_runner()


def _nothing() -> None:
    pass
