"""DHellamStrategy: trains a DualStrandMixin with two micro-batches in flight on every device."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_dhellam.anomalies import check_anomalies
from lightning_dhellam.layers import fp8_formats
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.parallel.choice import check_transport
from lightning_dhellam.pipeline.schedules import placement_of
from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.by_layer import USUAL, check_keys
from lightning_dhellam.plan.file import conditions
from lightning_dhellam.plan.offloading import check_choice
from lightning_dhellam.strategy import checks
from lightning_dhellam.strategy.idle import idle
from lightning_dhellam.strategy.setting_up import SettingUpStrategy
from lightning_dhellam.values import check_kinds, memory_bytes

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment


class DHellamStrategy(SettingUpStrategy):
    """Trains with two strands: while one micro-batch goes forward, another goes backward.

    The batch that a DataLoader yields is this rank's share of the global batch; it is cut into
    micro-batches. Data parallelism takes the processes that the other kinds of parallelism leave.

    Args:
        tensor_parallel_size: ranks that share each layer, with sequence parallelism.
        pipeline_parallel_size: stages P that share the layers, as chunks that lie where `schedule`
            has them: with `fold` 2P, of which stage s has s and 2P-1-s. Changes neither loss nor
            gradients.
        pipeline_split: layers of each chunk; None to balance them by cost, with the embedding and
            the output layer counted where they are.
        context_parallel_size: ranks C that share each sequence, for long ones: each has two of 2C
            pieces. Changes loss and gradients by rounding alone, unless experts drop tokens. Blocks
            of your own must be `token_wise`, and a `compute_loss` of your own sees each rank's
            pieces.
        context_exchange: how keys and values come to those ranks: from rank to rank (`ring`), or
            all at once (`all_gather`), which holds those of the whole sequence at a time. With
            `auto` a search takes what it predicts to be faster; without one it is `ring`.
        context_fp32_gradients: whether gradients by keys and values travel in fp32; otherwise in
            the type of activations, which is half of the bytes in 16 bits.
        context_fp8_keys: whether keys and values travel in 8 bits, each head of a token with a
            scale, but for layers with a window: other ranks' are rounded by at most 1/16 of a
            number. Attention computes as ever.
        context_transport: what carries the exchanges of a `ring` between GPUs: `nccl`, or
            `copy_engine`, by which a GPU pulls from the memory of another one of its host and
            leaves its processors to computation. With `auto` the faster of both is measured at the
            start; on several hosts it is `nccl`. Changes neither loss nor gradients.
        pipeline_transport: what carries hidden states and their gradients between the stages of a
            pipeline: `nccl`, `copy_engine` or `auto`, likewise.
        expert_parallel_size: ranks that share the experts of each layer, of all ranks of a stage:
            tokens go to the ranks of their experts and come back. Changes loss and gradients by
            rounding alone, unless a `capacity_factor` drops tokens, which each rank and micro-batch
            does by itself. All of them must have equally many micro-batches in each batch.
        expert_tensor_parallel_size: ranks that share each expert: as many as share each layer
            (None), or 1, so that experts are whole and lie on tensor-parallel ranks as well.
        micro_batch_size: samples that go through the layers together; the last micro-batch of a
            batch may be smaller. Changes loss and gradients by rounding alone, but for the masks
            of dropout, which are others, and for tokens that experts drop (`capacity_factor`).
        plan: order of the operators: `sequential`, `megatron`, `dhellam`, `interleaved`, `auto`,
            which searches the best in the first steps (see `callbacks.AutoSearch`), or the path
            of a plan file (`.json`). Changes neither loss nor gradients.
        distributed_optimizer: shard optimizer state over the ranks that hold the same weights, of
            data and context parallelism (ZeRO-1). None: when there are several, the optimizer is
            AdamW (or a class derived from it that says `elementwise = True`) and the precision is
            not `bf16-true`.
        kernels: backends to use by operator, such as `{attention: flash_attn}`; the fastest that
            this machine has for all others.
        recompute: what backward makes again, in place of keeping it: `none`; `gathers`, the inputs
            of column-parallel layers; `selective`, norms and activations as well; `full`, all but
            a layer's input; a list of choices and slots; or one of these by layer, as
            `{"0-3": "full", "4-": "selective"}`, with `chunk 0`, `head` and `others` as further
            keys. With `auto` what fits into memory at the least time is chosen, layer by layer: by
            measured times where plans are searched, else by FLOPs and bytes. Changes no bit.
        offload: what of that which is kept for backward waits in pinned host memory: `all`, or a
            list of slots, such as `[x]` beside `recompute="full"`. None for nothing. With `auto` it
            is chosen together with what is made again by `recompute="auto"`. Changes no bit.
        bucket_size: parameters per bucket of the data-parallel reduction.
        max_skipped_steps: steps whose loss or gradient is not finite are left out on all ranks;
            after so many in a row the run ends with a FloatingPointError.
        detect_anomaly: look at what every operator makes; where a step is not finite, name step,
            rank, layer, micro-batch and the operator that made it so first, and end the run by a
            FloatingPointError. With `warn` such a step is named, left out and the run goes on.
            `Trainer(detect_anomaly=True)` means the same as true. Slows steps down.
        seed: of weights and dropout; None for that of `seed_everything`, or else 1234.
        emulate: a cluster, the file of one, or the name of one that ships (`dhellam clusters`), of
            which this process plays a single rank; links take time and bring nothing, so numbers
            mean nothing and checkpoints are refused.
        timeout: after which a collective that a rank does not join fails.
        memory_limit: how much memory of each rank's device the run may take: a number of GiB, or
            text such as `40GiB`. None for what the GPU has; a CPU then has no limit.
        schedule: order of the works of a pipeline on each stage, and where its chunks lie: `fold`,
            `zb-v`, `dualpipe-v`, `1f1b`, `interleaved-1f1b` or, with N chunks a stage,
            `interleaved-1f1b-N` (see `dhellam plan schedule`); or the path of a file that holds one
            in the form in which schedules print. None for the usual one: `dualpipe-v` where ranks
            share layers, sequences or experts, and else `zb-v`. With `auto` those whose chunks lie
            as those of `fold`, and one that is searched for this run, are predicted, transfers and
            memory included, and the best are tried in the first steps (see `callbacks.AutoSearch`);
            a plan file keeps what was chosen. Changes neither loss nor gradients.
        resume_settings: whose settings win where `ckpt_path` has other ones than this run: those of
            the `checkpoint`, or the `arguments` that this run was given. What differs is said
            either way. A model that differs is refused, unless the `arguments` win and no shape
            depends on it.
        async_checkpoint: write checkpoints while training goes on: what is saved is copied to host
            memory, on CUDA beside the next step, and one is written at a time. One that cannot be
            written ends the run. Whatever ends a run waits until it is written.
        fp8: compute the linear layers of dense transformer layers in 8 bits: `current`, with one
            scale for each tensor as it is (E4M3, gradients E5M2), or `blockwise`, with one for each
            1 x 128 of activations and gradients and 128 x 128 of weights (E4M3). Embedding, output
            layer, norms and attention keep their type. None for no 8 bits, but for `current` with
            `Trainer(precision="transformer-engine")`.
        fp8_all_gather: let what these layers gather over tensor-parallel ranks travel in 8 bits,
            half of the bytes. With `current` it changes no bit; with `blockwise` what weight
            gradients read is rounded a second time.

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
        recompute: str | list[str] | dict[str | int, str | list[str]] = USUAL,
        bucket_size: int | None = None,
        max_skipped_steps: int = 10,
        seed: int | None = None,
        emulate: str | Cluster | None = None,
        timeout: timedelta | None = default_pg_timeout,
        resume_settings: str = "checkpoint",
        context_parallel_size: int = 1,
        context_exchange: str = "ring",
        context_fp32_gradients: bool = True,
        context_transport: str = "auto",
        pipeline_transport: str = "auto",
        expert_parallel_size: int = 1,
        expert_tensor_parallel_size: int | None = None,
        memory_limit: float | str | None = None,
        schedule: str | None = None,
        async_checkpoint: bool = False,
        fp8: str | None = None,
        fp8_all_gather: bool = False,
        context_fp8_keys: bool = False,
        detect_anomaly: bool | str = False,
        offload: str | list[str] | None = None,
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
        schedule = os.fspath(schedule) if isinstance(schedule, os.PathLike) else schedule
        checks.check_arguments(
            tensor_parallel_size,
            pipeline_parallel_size,
            micro_batch_size,
            plan,
            bucket_size,
            emulate,
            timeout,
            kernels,
            resume_settings,
            max_skipped_steps,
        )
        checks.check_context(context_parallel_size, context_exchange, kernels)
        check_transport(Lane.CP, context_transport, emulated=emulate is not None)
        check_transport(Lane.PP, pipeline_transport, emulated=emulate is not None)
        checks.check_experts(expert_parallel_size, expert_tensor_parallel_size)
        check_kinds(DHellamStrategy.__init__, locals())
        fp8_formats.check_name(fp8)
        check_anomalies(detect_anomaly)
        placement_of(schedule, pipeline_parallel_size)
        check_keys(recompute)
        check_choice(offload, recompute)
        self.tensor_parallel_size = tensor_parallel_size
        self.pipeline_parallel_size = pipeline_parallel_size
        self.pipeline_split = pipeline_split
        self.context_parallel_size = context_parallel_size
        self.context_exchange = context_exchange
        self.context_fp32_gradients = context_fp32_gradients
        self.context_fp8_keys = context_fp8_keys
        self.context_transport = context_transport
        self.pipeline_transport = pipeline_transport
        self.expert_parallel_size = expert_parallel_size
        self.expert_tensor_parallel_size = expert_tensor_parallel_size
        self.micro_batch_size = micro_batch_size
        self.plan = plan
        self.schedule = schedule
        self.distributed_optimizer = distributed_optimizer
        self.kernels = kernels
        self.recompute = recompute
        self.offload = offload
        self.bucket_size = bucket_size
        self.max_skipped_steps = max_skipped_steps
        self._seed = seed
        self.cluster = Cluster.load(emulate) if isinstance(emulate, str) else emulate
        self.resume_settings = resume_settings
        self.memory_limit = (
            None if memory_limit is None else memory_bytes("memory_limit", memory_limit)
        )
        self.async_checkpoint = async_checkpoint
        self.detect_anomaly = detect_anomaly
        self._fp8 = fp8
        self.fp8_all_gather = fp8_all_gather
        checks.check_links(self.cluster, context_parallel_size, expert_parallel_size)
        self.timeout = timeout or default_pg_timeout
        self._ended_well = True

    def check(self, trainer: pl.Trainer, data: Any = None, ckpt_path: Any = None) -> None:
        """Refuse what cannot work, before any process computes.

        `data` is the data module, before the trainer has it, and `ckpt_path` what it is to load.

        Raises:
            ValueError: with the value, the rule and the remedy.
        """
        checks.check_trainer(trainer)
        checks.check_places(trainer, self.processes)
        checks.check_module(
            trainer.lightning_module, self.topology, self.placement(), self.pipeline_split
        )
        data = data or getattr(trainer, "datamodule", None)
        checks.check_data(trainer.lightning_module, data, self.topology)
        checks.check_hyperparameters(trainer, data)
        checks.check_plan_file(self.plan, self._early_conditions)
        checks.check_ckpt_path(
            ckpt_path,
            self._module.model_config,
            self.processes,
            training=trainer.state.fn is TrainerFn.FITTING,
            resume_settings=self.resume_settings,
        )
        if self.root_device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"accelerator='{self.root_device.type}' does not work with DHellamStrategy: use"
                " 'gpu' or 'cpu'"
            )
        check_transport(Lane.CP, self.context_transport, self.root_device.type)
        check_transport(Lane.PP, self.pipeline_transport, self.root_device.type)
        fp8_formats.check_gathers(self.fp8, self.fp8_all_gather)
        if self.fp8 is not None:
            fp8_formats.check_place(self.fp8, self.root_device, self.dtype, self.kernels)
            config = self._module.model_config
            fp8_formats.check_shapes(self.fp8, config, self.tensor_parallel_size)

    @override
    def setup_environment(self) -> None:
        trainer = self._module.trainer
        self.check(trainer)
        self._context = self._runner = self._optimizer = None
        self._ended_well = True
        plans, schedules = self.plan == "auto", self._searches_schedules
        if (plans or schedules) and trainer.state.fn is TrainerFn.FITTING:
            # Only a search needs numba, which takes longer to load than all the rest of ours.
            from lightning_dhellam.autosearch import AutoSearch

            AutoSearch.attach(trainer, plans=plans, schedules=schedules)
        super().setup_environment()
        for line in idle(self, self.topology, self._module.model_config):
            rank_zero_warn(line)
        if self.cluster is not None:
            self._announce(self.cluster)

    @property
    def _early_conditions(self) -> dict[str, Any]:
        """What a plan must have been made for, as far as it is known without a process group."""
        config = self._module.model_config
        return conditions(self.topology.sizes, config, self.dtype, self.micro_batch_size)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._ended_well = False
        self._say_unwritten()
        self._say_why(exception)

    @override
    def teardown(self) -> None:
        self._close_background()
        self._leave_others()
        if self._runner is not None:
            self._runner.close()
        # What saving a checkpoint needs stays until the next run.
        self.precision_plugin.optimizer = None
        self._leave(ended_well=self._ended_well)
        super().teardown()


StrategyRegistry.register(
    DHellamStrategy.strategy_name,
    DHellamStrategy,
    description="Two micro-batches in flight on every device, on Megatron-core parallel layers",
)
