"""DHellamStrategy: trains a DualStrandMixin with two micro-batches in flight on every device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from torch import Tensor
from typing_extensions import override

from lightning_dhellam import checkpoint as checkpoint_files
from lightning_dhellam.autosearch.profiling import conditions, early_conditions
from lightning_dhellam.engine import Engine, MicroBatch, cut, make_lanes
from lightning_dhellam.layers import lower
from lightning_dhellam.models import pipeline_split
from lightning_dhellam.module import DualStrandMixin, seed_of_run
from lightning_dhellam.parallel import Cluster, ParallelContext, Topology
from lightning_dhellam.parallel.collectives import from_first, reduced, same_on_all_ranks
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.nccl import open_queues
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer, can_shard
from lightning_dhellam.plan import Builder, Lane
from lightning_dhellam.plan.file import named_plan
from lightning_dhellam.strategy import checks
from lightning_dhellam.strategy.launcher import CheckingLauncher
from lightning_dhellam.strategy.precision import DHellamPrecision
from lightning_dhellam.strategy.termination import Termination, watch_parent

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment


class DHellamStrategy(ParallelStrategy):
    """Trains with two strands: while one micro-batch goes forward, another goes backward.

    The batch that a DataLoader yields is this rank's share of the global batch; it is cut into
    micro-batches. Data parallelism takes the processes that tensor and pipeline parallelism leave.

    Args:
        tensor_parallel_size: ranks that share each layer, with sequence parallelism.
        pipeline_parallel_size: stages P that share the layers, as 2P chunks: stage s has chunks s
            and 2P-1-s. Changes neither loss nor gradients.
        pipeline_split: layers of each of the 2P chunks; None to balance them by cost, with the
            embedding and the output layer on stage 0 counted.
        micro_batch_size: samples that go through the layers together. Changes neither loss nor
            gradients; the last micro-batch of a batch may be smaller.
        plan: order of the operators: `sequential`, `megatron`, `dhellam`, `interleaved`, `auto`,
            which searches the best in the first steps (see `callbacks.AutoSearch`), or the path
            of a plan file (`.json`). Changes neither loss nor gradients.
        distributed_optimizer: shard optimizer state over data-parallel ranks (ZeRO-1). None: when
            there are several, the optimizer is AdamW and the precision is not `bf16-true`.
        kernels: backends to use by operator, such as `{attention: flash_attn}`; the fastest that
            this machine has for all others.
        regather: gather the input of column-parallel layers again in backward; False keeps it,
            which saves communication and costs memory.
        bucket_size: parameters per bucket of the data-parallel reduction.
        seed: of weights and dropout; None for that of `seed_everything`, or else 1234.
        emulate: a cluster, the file of one, or the name of one that ships (`dhellam clusters`), of
            which this process plays a single rank; links take time and bring nothing, so numbers
            mean nothing and checkpoints are refused.
        timeout: after which a collective that a rank does not join fails.

    Raises:
        ValueError: a value or a combination that cannot work, before any process computes.
    """

    strategy_name = "dhellam"

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        pipeline_split: list[int] | None = None,
        micro_batch_size: int = 1,
        plan: str = "interleaved",
        distributed_optimizer: bool | None = None,
        kernels: dict[str, str] | None = None,
        regather: bool = True,
        bucket_size: int | None = None,
        seed: int | None = None,
        emulate: str | Cluster | None = None,
        timeout: timedelta | None = default_pg_timeout,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin
        )
        plan = os.fspath(plan) if isinstance(plan, os.PathLike) else plan
        checks.check_arguments(
            tensor_parallel_size,
            pipeline_parallel_size,
            micro_batch_size,
            plan,
            bucket_size,
            emulate,
            timeout,
            kernels,
        )
        self.tensor_parallel_size = tensor_parallel_size
        self.pipeline_parallel_size = pipeline_parallel_size
        self.pipeline_split = pipeline_split
        self.micro_batch_size = micro_batch_size
        self.plan = self.plan_in_use = plan
        self.distributed_optimizer = distributed_optimizer
        self.kernels = kernels
        self.kernels_in_use: dict[str, str] = {}
        self.regather = regather
        self.bucket_size = bucket_size
        self._seed = seed
        self.cluster = Cluster.load(emulate) if isinstance(emulate, str) else emulate
        self.num_nodes = 1
        self._timeout = timeout or default_pg_timeout
        self._context: ParallelContext | None = None
        self._engine: Engine | None = None
        self._buffers: GradientBuffers | None = None
        self._optimizer: ModelParallelOptimizer | None = None
        self._termination: Termination | None = None
        self._parent_watch: Event | None = None
        self._losses_left: int | None = None
        self._ended_well = True

    @property
    def context(self) -> ParallelContext:
        """Groups and sizes of this rank."""
        if self._context is None:
            raise RuntimeError(
                "DHellamStrategy.context is not known before the processes have started: use it in"
                " `configure_model` or later"
            )
        return self._context

    @property
    def engine(self) -> Engine:
        """What runs the plans of this rank."""
        if self._engine is None:
            raise RuntimeError(
                "DHellamStrategy.engine does not exist before the model: use it after `setup`"
            )
        return self._engine

    @property
    def _module(self) -> DualStrandMixin:
        """What is trained; `check` has made sure that it can be."""
        assert isinstance(self.lightning_module, DualStrandMixin)
        return self.lightning_module

    @property
    def seed(self) -> int:
        """Of weights and dropout."""
        return seed_of_run() if self._seed is None else self._seed

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
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes of this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def is_distributed(self) -> bool:
        """Lightning asks strategies that it does not know, before it reduces logged values."""
        return True

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Samples are dealt to the data-parallel ranks; all others of a model see the same."""
        return {
            "num_replicas": self.context.topology.dp_size,
            "rank": self.context.topology.dp_rank,
        }

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        return True

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally:
            if self.cluster is None:
                checks.check_processes(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = CheckingLauncher(
                self.cluster_environment, self.num_processes, self.num_nodes, self.check
            )
        _ = self._topology  # refuses sizes that do not fit
        if self.cluster is not None:
            checks.check_emulation(self.num_processes * self.num_nodes)

    @property
    def _topology(self) -> Topology:
        """Of the job, or of the cluster that is emulated; its rank is 0 before there are any.

        Raises:
            ValueError: the sizes do not fit the number of processes.
        """
        processes = self.num_processes * self.num_nodes
        return Topology(
            world_size=self.cluster.world_size if self.cluster is not None else processes,
            tp_size=self.tensor_parallel_size,
            pp_size=self.pipeline_parallel_size,
        )

    def check(self, trainer: pl.Trainer, data: Any = None, ckpt_path: Any = None) -> None:
        """Refuse what cannot work, before any process computes.

        `data` is the data module, before the trainer has it, and `ckpt_path` what it is to load.

        Raises:
            ValueError: with the value, the rule and the remedy.
        """
        checks.check_trainer(trainer)
        checks.check_module(trainer.lightning_module, self._topology, self.pipeline_split)
        data = data or getattr(trainer, "datamodule", None)
        checks.check_data(trainer.lightning_module, data, self._topology)
        checks.check_plan_file(self.plan, self._early_conditions)
        checks.check_ckpt_path(ckpt_path)
        if self.root_device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"accelerator='{self.root_device.type}' does not work with DHellamStrategy: use"
                " 'gpu' or 'cpu'"
            )

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self.check(trainer)
        self._context = self._optimizer = None
        self._ended_well = True
        if self.plan == "auto" and trainer.state.fn is TrainerFn.FITTING:
            from lightning_dhellam.autosearch.callback import (
                AutoSearch,  # which imports this module
            )

            AutoSearch.attach(trainer)
        if self.root_device.type == "cuda":
            obstacle = open_queues()
            if obstacle:
                rank_zero_warn(obstacle)
        super().setup_environment()
        reset_seed()
        self._set_world_ranks()
        if self.cluster is not None:
            self.cluster.join()
        else:
            self._join_processes()
        self._context = ParallelContext.create(
            self.root_device,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            cluster=self.cluster,
            pipeline_split=pipeline_split(
                self._module.model_config, self.pipeline_parallel_size, self.pipeline_split
            ),
            timeout=self._timeout,
        )
        if self.cluster is not None:
            self._announce(self.cluster)

    def _announce(self, cluster: Cluster) -> None:
        """Say that the run is emulated, and how well: in the log and in the loggers' files."""
        rank_zero_info(f"EMULATED {cluster}. Times mean something, numbers do not.")
        for name, link in self.context.links.items():
            rank_zero_info(f"link {name}: {link.calibrated()}")
        for logger in self._module.trainer.loggers:
            logger.log_hyperparams({"emulated": str(cluster)})

    def _join_processes(self) -> None:
        assert self.cluster_environment is not None
        backend = _get_default_process_group_backend_for_device(self.root_device)
        device_id = self.root_device if self.root_device.type == "cuda" else None
        # From here on this process waits for others.
        self._parent_watch = watch_parent(self._timeout.total_seconds())
        _init_dist_connection(
            self.cluster_environment, backend, timeout=self._timeout, device_id=device_id
        )

    def _set_world_ranks(self) -> None:
        assert self.cluster_environment is not None
        rank = self.node_rank * self.num_processes + self.local_rank
        self.cluster_environment.set_global_rank(rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if self.world_group is not None:
            self._termination = Termination(trainer, self.world_group)
        self.model_to_device()
        fitting = trainer.state.fn is TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        module = self._module
        lowered = lower(
            module.model, regather=self.regather, loss=module.custom_loss, kernels=self.kernels
        )
        rank_zero_info(str(lowered.kernels))
        self.kernels_in_use = dict(lowered.kernels.names)
        lanes = make_lanes(self.root_device, processors=self.context.link_processors)
        # What is searched begins with the plan that it has to beat.
        plan = "sequential" if self.plan == "auto" else self.plan
        builder = named_plan(plan, self.conditions)
        self._engine = Engine(lowered.layers, lanes, builder, lowered.logits, lowered.stage, module)
        self._check_split()
        self.use_plan(plan, builder)
        self.setup_precision_plugin()
        self.barrier()

    def _check_split(self) -> None:
        """All stages must send and receive the same micro-batches at the same places."""
        split = self.context.pipeline_split
        if same_on_all_ranks(str(split), self.world_group):
            raise ValueError(
                f"pipeline_split={list(split)} is another one on other ranks: every rank must run"
                " the same model and split"
            )

    def use_plan(self, name: str, builder: Builder) -> None:
        """Order operators by `builder` from the next step on. Every rank must call this.

        Raises:
            ValueError: ranks would order them differently, and wait for each other forever.
        """
        self.engine.install(builder)
        self.plan_in_use = name
        digests = " ".join(plan.digest for plan in self.engine.plans())
        stage = self.context.topology.pp_rank
        if same_on_all_ranks(f"{name}: {digests}", self.world_group, stage=stage):
            raise ValueError(
                f"plan='{name}' orders the operators differently on different ranks: every"
                " rank must run the same model, plan and version"
            )

    @property
    def world_group(self) -> dist.ProcessGroup | None:
        """All ranks; None where the others do not exist."""
        return self.context.world_group

    @property
    def stage_group(self) -> dist.ProcessGroup | None:
        """The ranks that run the same layers; None where the others do not exist."""
        if self.context.topology.pp_size == 1:
            return self.world_group
        return self.context.groups.tp_dp_cp

    @property
    def conditions(self) -> dict[str, Any]:
        """What a plan file must have been made for to be used here."""
        config = self._module.model_config
        return conditions(self.context, config, self.dtype, self.micro_batch_size)

    @property
    def _early_conditions(self) -> dict[str, Any]:
        """Those that need no process group."""
        config = self._module.model_config
        return early_conditions(self._topology, config, self.dtype, self.micro_batch_size)

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
        model = self._module.model
        sharded = self._shards(optimizer)
        self._buffers = GradientBuffers(
            model,
            model.transformer_config,
            self.context,
            sharded=sharded,
            fp32=self.precision_plugin.fp32_gradients,
            bucket_size=self.bucket_size,
        )
        self._optimizer = self.precision_plugin.optimizer = ModelParallelOptimizer(
            optimizer,
            self._buffers,
            self.context,
            sharded=sharded,
            master_weights=self.precision_plugin.master_weights,
        )

    def _shards(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether Megatron's distributed optimizer is used."""
        possible = can_shard(optimizer) and self.precision_plugin.precision != "bf16-true"
        if self.distributed_optimizer is None:
            return possible and self.context.topology.dp_size > 1
        if self.distributed_optimizer and not possible:
            raise ValueError(
                f"distributed_optimizer=True does not work with {type(optimizer).__name__} and"
                f" precision='{self.precision_plugin.precision}': it needs torch.optim.AdamW and"
                " '32-true' or 'bf16-mixed'; or leave distributed_optimizer out"
            )
        return self.distributed_optimizer

    @override
    def model_to_device(self) -> None:
        self._module.to(self.root_device)

    @override
    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        checks.check_ids(batch, self._module)
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._losses_left = 1
        try:
            output = super().training_step(*args, **kwargs)
            if self._losses_left and output is not None:
                raise ValueError(
                    "training_step returned a loss without self.batch_loss(batch), which computes"
                    " the gradients under DHellamStrategy: call it (for a loss of your own override"
                    " compute_loss), or return None to skip the batch"
                )
            return output
        finally:
            self._losses_left = None

    def run_batch(self, batch: Mapping[str, Any], *, backward: bool) -> Tensor:
        """Loss of this rank's batch, a scalar in fp32; with `backward`, its gradients as well."""
        pieces = self.micro_batches(batch)
        if not backward:
            return from_first(self.engine.evaluate(pieces), self.context.pp_group)
        assert self._buffers is not None, "the strategy was not set up for fitting"
        if self._losses_left == 0:
            raise ValueError(
                "training_step called batch_loss twice, and the second gradients would replace the"
                " first: call it once, with one batch that holds all samples"
            )
        self._losses_left = 0 if self._losses_left else None
        self._buffers.zero()
        loss = self.engine.train(pieces, self._gradient_ready)
        self._buffers.finish()
        return from_first(loss, self.context.pp_group)

    def run_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [B, S, V] of this rank's batch."""
        logits = self.engine.predict(self.micro_batches(batch, needs_labels=False))
        if self.context.topology.pp_rank > 0:
            shape = (*batch["tokens"].shape, self._module.model_config.vocab_size)
            logits = torch.empty(shape, dtype=self.dtype, device=self.root_device)
        return from_first(logits, self.context.pp_group)

    def _gradient_ready(self, parameters: tuple[Any, ...]) -> None:
        assert self._buffers is not None
        self._buffers.ready(parameters, lambda: self.engine.lanes.on(Lane.DP))

    def micro_batches(
        self, batch: Mapping[str, Any], *, needs_labels: bool = True
    ) -> list[MicroBatch]:
        """The batch of this rank, checked and cut."""
        checks.check_batch(batch, self._module, self.context.topology, needs_labels)
        return cut(
            batch,
            self.micro_batch_size,
            device=self.root_device,
            seed=self.seed,
            step=self._module.trainer.global_step,
            rank=self.context.topology.rank_in_stage,
            targets=needs_labels,
        )

    @override
    def backward(
        self,
        closure_loss: Tensor,
        optimizer: torch.optim.Optimizer | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Nothing is left to do: the gradients are already there."""
        self.precision_plugin.pre_backward(closure_loss, self._module)
        return self.precision_plugin.post_backward(closure_loss, self._module)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # A callback such as GradientAccumulationScheduler may have changed it after the start.
        checks.check_trainer(self._module.trainer)
        self._end_if_told()

    def _end_if_told(self) -> None:
        if self._termination is not None:
            self._termination.check()

    # Where ranks meet outside of steps.
    on_train_end = on_validation_start = on_validation_end = _end_if_told
    on_test_start = on_predict_start = _end_if_told

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        # The container places its own weights, so Lightning's default device must not interfere.
        yield

    @override
    def barrier(self, name: str | None = None) -> None:
        if not _distributed_is_initialized():
            return
        if self.root_device.type == "cuda":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not _distributed_is_initialized() or self.cluster is not None:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Any:
        """Over the data-parallel ranks: all ranks of a model hold the same value."""
        if isinstance(tensor, Tensor):
            return reduced(tensor, group or self.context.dp_group, reduce_op)
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        mine = torch.tensor(int(decision), device=self.root_device)
        return bool(reduced(mine, self.world_group, "min" if all else "max"))

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder with one file per rank; see `parallel.checkpoint`."""
        if self.cluster is not None:
            raise ValueError(
                "this run is emulated (emulate=...): its numbers mean nothing, so it saves no"
                " checkpoint; use Trainer(enable_checkpointing=False)"
            )
        if storage_options is not None:
            raise ValueError(
                "storage_options is not supported: DHellamStrategy writes checkpoints itself"
            )
        common = dict(checkpoint)
        weights = common.pop("state_dict")
        with_state = common.pop("optimizer_states", None) is not None
        state = settings = None
        if with_state and self._optimizer is not None:
            state, settings = self._optimizer.state_dict(), self._state_settings()
        path = Path(self.broadcast(str(filepath)))
        checkpoint_files.save(path, self.context, common, weights, state, settings)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        fitting = self._module.trainer.state.fn is TrainerFn.FITTING
        settings = self._state_settings() if fitting else None
        return checkpoint_files.load(path, self.context, settings)

    def _state_settings(self) -> dict[str, Any]:
        assert self._optimizer is not None
        return {"precision": self.precision_plugin.precision, **self._optimizer.settings}

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        try:
            super().load_model_state_dict(checkpoint, strict)
        except RuntimeError as error:
            # Not before: a module may take weights of other names.
            found = checkpoint_files.misfit(checkpoint["state_dict"], self._module.state_dict())
            if found is None:
                raise
            raise ValueError(found) from error
        if self._optimizer is not None:
            self._optimizer.reload()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._optimizer is not None
        (state,) = checkpoint["optimizer_states"]
        self._optimizer.load_state_dict(state)

    @override
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Nothing here: every rank writes its own in `save_checkpoint`."""
        return {}

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._ended_well = False

    @override
    def teardown(self) -> None:
        if self._termination is not None:
            self._termination.close()
        if self._parent_watch is not None:
            self._parent_watch.set()
        if self._buffers is not None:
            self._buffers.close()
        self._engine = self._buffers = self._termination = None
        # What saving a checkpoint needs stays until the next run.
        self.precision_plugin.optimizer = None
        if self._context is not None:
            self._context.destroy(keep=self._ended_well and self.cluster is None)
            if self.cluster is not None:
                dist.destroy_process_group()
        super().teardown()


StrategyRegistry.register(
    DHellamStrategy.strategy_name,
    DHellamStrategy,
    description="Two micro-batches in flight on every device, on Megatron-core parallel layers",
)
