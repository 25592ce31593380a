"""A strategy that makes a runner of its arguments when a run begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_dhellam.displays import size_of
from lightning_dhellam.hosted import Place
from lightning_dhellam.models import crossing_bytes, pipeline_split
from lightning_dhellam.module import seed_of_run
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.pipeline.schedules import AUTO as ANY
from lightning_dhellam.pipeline.schedules import Placement, begun, placement_of
from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.runner import Runner
from lightning_dhellam.strategy import checks
from lightning_dhellam.strategy.planning import MemoryWatch
from lightning_dhellam.strategy.precision import DHellamPrecision
from lightning_dhellam.strategy.stepping import SteppingStrategy

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SettingUpStrategy(SteppingStrategy):
    """A strategy that makes its runner and its optimizer when a run begins.

    Its subclass sets the attributes, which are arguments of it and say what the runner is to be.
    """

    pipeline_split: list[int] | None
    context_exchange: str
    context_fp32_gradients: bool
    context_fp8_keys: bool
    micro_batch_size: int
    plan: str
    schedule: str | None
    distributed_optimizer: bool | None
    kernels: dict[str, str] | None
    recompute: str | list[str] | dict[str | int, str | list[str]]
    offload: str | list[str] | None
    bucket_size: int | None
    max_skipped_steps: int
    detect_anomaly: bool | str
    memory_limit: int | None
    _seed: int | None
    _fp8: str | None
    fp8_all_gather: bool

    @property
    def seed(self) -> int:
        """Seed of weights and dropout."""
        return seed_of_run() if self._seed is None else self._seed

    @property
    def fp8(self) -> str | None:
        """How linear layers compute in 8 bits, as an argument or the precision says."""
        return self._fp8 or self.precision_plugin.fp8

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return self.precision_plugin.dtype

    @property
    @override
    def precision_plugin(self) -> DHellamPrecision:
        if self._precision_plugin is None:
            self._precision_plugin = DHellamPrecision("32-true")
        assert isinstance(self._precision_plugin, DHellamPrecision)
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # None must stay None: Lightning takes anything else for a plugin that the user has chosen.
        self._precision_plugin = DHellamPrecision.of(precision_plugin) if precision_plugin else None

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        return True

    @override
    def layers_of_chunks(self) -> tuple[int, ...]:
        config = self._module.model_config
        return pipeline_split(config, self.placement(), self.pipeline_split)

    @override
    def placement(self) -> Placement:
        return placement_of(self.schedule, self.pipeline_parallel_size)

    @override
    def ties(self) -> bool:
        return self._module.model_config.tie_embeddings

    @override
    def crossing(self) -> Mapping[Lane, int]:
        config = self._module.model_config
        length = getattr(getattr(self._module.trainer, "datamodule", None), "sequence_length", None)
        tokens = self.micro_batch_size * (length or config.max_sequence_length)
        return crossing_bytes(config, self.dtype, tokens)

    def _announce(self, cluster: Cluster) -> None:
        """Say that the run is emulated, and how well: in the log and in the loggers' files."""
        rank_zero_info(f"EMULATED {cluster}. Times mean something, numbers do not.")
        for name, link in self.context.links.items():
            rank_zero_info(f"link {name}: {link.calibrated()}")
        for logger in self._module.trainer.loggers:
            logger.log_hyperparams({"emulated": str(cluster)})

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._meet_others(trainer)
        self.model_to_device()
        module = self._module
        self._runner = Runner(
            module.model,
            # What is searched begins with the plan that it has to beat.
            plan="sequential" if self.plan == "auto" else self.plan,
            micro_batch_size=self.micro_batch_size,
            precision=self.precision_plugin.precision,
            seed=self.seed,
            loss=module.custom_loss,
            kernels=self.kernels,
            recompute=self.recompute,
            offload=self.offload,
            context_exchange=self.context_exchange,
            context_fp32_gradients=self.context_fp32_gradients,
            context_fp8_keys=self.context_fp8_keys,
            schedule=self._begun if self._searches_schedules else self.schedule,
            fp8=self.fp8,
            fp8_all_gather=self.fp8_all_gather,
            bucket_size=self.bucket_size,
            memory_limit=self.memory_limit,
            module=module,
        )
        rank_zero_info(str(self._runner.agreed.kernels))
        for lane, why in self.context.carried.items():
            rank_zero_info(f"exchanges of the {lane} lane: {why}")
        if trainer.state.fn is TrainerFn.FITTING:
            config = module.model_config
            length = getattr(getattr(trainer, "datamodule", None), "sequence_length", None)
            size = size_of(module.model, config, self.context, length or config.max_sequence_length)
            rank_zero_info(size)
            self.setup_optimizers(trainer)
            self._watch = MemoryWatch(self, self.memory_limit)
            self._rehearse(self._watch, getattr(trainer, "datamodule", None))
        self.setup_precision_plugin()
        self.barrier()

    def _rehearse(self, watch: MemoryWatch, data: Any) -> None:
        """Have the kernels of 8 bits compiled before the first step, where its shape is known.

        They are compiled when they are first launched, which takes seconds. What makes a loss of
        its own may read of a batch what nobody can make up.
        """
        samples, length = getattr(data, "batch_size", None), getattr(data, "sequence_length", None)
        if self.fp8 is None or self._module.custom_loss is not None:
            return
        if isinstance(samples, int) and isinstance(length, int):
            watch.begin(self.runner, self._module, samples, length)  # which refuses what cannot fit
            self.runner.rehearse(samples, length)

    @property
    def _begun(self) -> str:
        """The schedule of the first step."""
        topology = self.context.topology
        return begun(self.schedule, topology.pp_size, topology.shared, self.recompute, self.offload)

    @property
    def _searches_schedules(self) -> bool:
        """Whether the schedule is to be searched: there is a choice, which no file has made."""
        if self.schedule != ANY or self.pipeline_parallel_size == 1:
            return False
        return not (self.plan.endswith(".json") and PlanFile.load(self.plan).schedule)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            # Lightning's remedy, manual optimization, is none here.
            if "multiple optimizers" not in str(error):
                raise
            raise ValueError(
                "configure_optimizers returned several optimizers: DHellamStrategy needs exactly"
                " one; use its parameter groups"
            ) from None
        (optimizer,) = self.optimizers
        checks.check_optimizer(self._module, optimizer)
        if self.precision_plugin.precision == "bf16-true":
            stuck = checks.stuck_average(optimizer, self.dtype)
            if stuck:
                rank_zero_warn(stuck)
        self._optimizer = self.precision_plugin.optimizer = self.runner.optimizer(
            optimizer,
            distributed_optimizer=self.distributed_optimizer,
            max_skipped_steps=self.max_skipped_steps,
            scaling=self.precision_plugin.scaling,
            detect_anomaly=self.detect_anomaly or trainer._detect_anomaly,
        )
        self.precision_plugin.before_update = self._hold

    @override
    def model_to_device(self) -> None:
        self._module.to(self.root_device)

    def has_place(self) -> bool:
        """Whether the processes have started, so that the model can be built."""
        return self._context is not None

    def place(self) -> Place:
        """Where the model is built, once the processes have started."""
        return Place(self.context, self.dtype, self.seed)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        # The container places its own weights, so Lightning's default device must not interfere.
        yield
