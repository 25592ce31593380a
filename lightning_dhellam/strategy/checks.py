"""Everything about a run that can be wrong, checked before any process computes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import TrainerFn

from lightning_dhellam.checkpoint import check_model, check_readable
from lightning_dhellam.engine.inputs import check_length
from lightning_dhellam.files import local_path
from lightning_dhellam.kernels.choose import check_names
from lightning_dhellam.layers import check_exchange
from lightning_dhellam.models import ModelConfig, pipeline_split
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.parallel import Cluster, Topology
from lightning_dhellam.parallel.optimizer_state import RESUME_SETTINGS
from lightning_dhellam.plan.file import PlanFile, named_plan
from lightning_dhellam.plan.placement import Placement
from lightning_dhellam.remote import place_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import ClusterEnvironment

_RESOLVED_BY_LIGHTNING = ("best", "last", "hpc", "registry")


def check_arguments(
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    micro_batch_size: int,
    plan: str,
    bucket_size: int | None,
    emulate: Any,
    timeout: Any,
    kernels: Any,
    resume_settings: Any,
    max_skipped_steps: int,
) -> None:
    """Refuse values of `DHellamStrategy`'s own arguments that no run can use."""
    for name, value in (
        ("tensor_parallel_size", tensor_parallel_size),
        ("pipeline_parallel_size", pipeline_parallel_size),
        ("micro_batch_size", micro_batch_size),
        ("bucket_size", bucket_size),
        ("max_skipped_steps", max_skipped_steps),
    ):
        if value is not None or name != "bucket_size":
            check_count(name, value)
    if not isinstance(plan, str):
        raise ValueError(f"plan={plan!r} must be a string: the name of a plan, or a file's path")
    if plan != "auto":
        named_plan(plan)
    if resume_settings not in RESUME_SETTINGS:
        raise ValueError(
            f"resume_settings={resume_settings!r} must be one of {', '.join(RESUME_SETTINGS)}"
        )
    if timeout is not None and not isinstance(timeout, timedelta):
        raise ValueError(
            f"timeout={timeout!r} must be a datetime.timedelta, such as timedelta(minutes=10)"
        )
    if kernels is not None and not isinstance(kernels, Mapping):
        raise ValueError(
            f"kernels={kernels!r} must be a mapping from operator to backend, such as"
            " {'attention': 'flash_attn'}"
        )
    if emulate is not None and pipeline_parallel_size > 1:
        raise ValueError(
            f"emulate=... plays one rank alone, but with"
            f" pipeline_parallel_size={pipeline_parallel_size} a stage computes only what others"
            " send: leave pipeline_parallel_size at 1; `dhellam simulate` predicts pipelines"
        )


def check_count(name: str, value: Any) -> None:
    """Refuse what is no number of ranks, samples or parameters."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_context(
    context_parallel_size: int, context_exchange: str, kernels: Mapping[str, str] | None
) -> None:
    """Refuse arguments of `DHellamStrategy` by which no sequence can be shared."""
    check_count("context_parallel_size", context_parallel_size)
    check_exchange(context_exchange)
    check_names(kernels or {}, in_blocks=context_parallel_size > 1)


def check_experts(expert_parallel_size: int, expert_tensor_parallel_size: int | None) -> None:
    """Refuse arguments of `DHellamStrategy` by which no experts can be shared."""
    check_count("expert_parallel_size", expert_parallel_size)
    if expert_tensor_parallel_size is not None:
        check_count("expert_tensor_parallel_size", expert_tensor_parallel_size)


def check_links(
    cluster: Cluster | None, context_parallel_size: int, expert_parallel_size: int
) -> None:
    """Refuse an emulated cluster over which what ranks exchange would take no time."""
    for lane, size, what, name in (
        ("cp", context_parallel_size, "keys and values", "context_parallel_size"),
        ("ep", expert_parallel_size, "tokens on their way to experts", "expert_parallel_size"),
    ):
        if cluster is None or cluster.networks is not None:
            continue
        if size > 1 and lane not in cluster.links:
            raise ValueError(
                f"emulate='{cluster.name}' has no link '{lane}', so with {name}={size} {what}"
                " would take no time: add one under `links`"
            )


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse flags of the Trainer that cannot work with two strands, by name."""
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} conflicts with"
            " DHellamStrategy, which accumulates over the micro-batches of each batch: leave it at"
            " 1 and make the DataLoader's batch larger; micro_batch_size stays as it is"
        )
    if trainer._accelerator_connector._layer_sync is not None:
        raise ValueError(
            "sync_batchnorm=True has no meaning for DHellamStrategy's layers: leave it at False"
        )
    emulated = getattr(trainer.strategy, "cluster", None) is not None
    if emulated and (trainer._detect_anomaly or getattr(trainer.strategy, "detect_anomaly", False)):
        raise ValueError(
            "emulate=... computes numbers that mean nothing, so there are no anomalies to detect:"
            " leave detect_anomaly at False"
        )
    if emulated and trainer.checkpoint_callbacks and trainer.state.fn is TrainerFn.FITTING:
        raise ValueError(
            "emulate=... computes numbers that mean nothing, so it saves no checkpoint: use"
            " Trainer(enable_checkpointing=False), and no ModelCheckpoint"
        )
    checkpoint_io = trainer.strategy.checkpoint_io
    if type(checkpoint_io) is not TorchCheckpointIO:
        raise ValueError(
            f"plugins={type(checkpoint_io).__name__} would not be used: DHellamStrategy writes its"
            " checkpoints, a folder with a file per rank, itself; leave the plugin out"
        )
    for callback in getattr(trainer, "callbacks", ()):
        _check_callback(callback)


def check_places(trainer: pl.Trainer, processes: int) -> None:
    """Refuse folders that a run cannot save in: they may be on any file system of fsspec's."""
    if trainer.state.fn is not TrainerFn.FITTING:
        return
    root = trainer.default_root_dir
    local_path(root, f"default_root_dir={root}")
    for callback in trainer.checkpoint_callbacks:
        folder = getattr(callback, "dirpath", None)
        if folder is not None:
            place_of(folder, f"{type(callback).__name__}(dirpath={str(folder)!r})", processes)
        elif trainer.loggers and trainer.loggers[0].save_dir:
            name, folder = type(callback).__name__, trainer.loggers[0].save_dir
            place_of(folder, f"{name} without dirpath, beside the logs in {folder}", processes)


def _check_callback(callback: pl.Callback) -> None:
    name = type(callback).__name__
    if (
        isinstance(callback, GradientAccumulationScheduler)
        and callback.going_to_accumulate_grad_batches()
    ):
        raise ValueError(
            f"{name}({callback.scheduling}) conflicts with DHellamStrategy, which accumulates over"
            " the micro-batches of each batch: leave the callback out"
        )
    if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
        raise ValueError(
            f"{name} averages weights in a copy of the whole module, and one under DHellamStrategy"
            " cannot be copied, since it holds groups of processes: leave the callback out, average"
            " parameters one by one in a callback of your own, and copy them back in place"
        )
    if isinstance(callback, ModelPruning):
        raise ValueError(
            f"{name} multiplies weights by masks when modules are called, and the operators that"
            " DHellamStrategy runs read the weights themselves: leave the callback out, and prune"
            " the weights that `save_pretrained` writes"
        )


def check_hyperparameters(trainer: pl.Trainer, data: Any) -> None:
    """Refuse hyperparameters of which the first checkpoint would say that it cannot hold them."""
    if trainer.state.fn is not TrainerFn.FITTING or not trainer.checkpoint_callbacks:
        return
    for owner in (trainer.lightning_module, data):
        hparams = getattr(owner, "hparams_initial", None)
        if isinstance(hparams, Mapping):
            check_readable(hparams, f"{type(owner).__name__}.hparams")


def check_processes(environment: ClusterEnvironment, devices: int, num_nodes: int) -> None:
    """Refuse processes that torchrun or SLURM has started in another number than the Trainer's."""
    # Lightning's own learns the number from the strategy.
    if isinstance(environment, LightningEnvironment):
        return
    started, local_rank = environment.world_size(), environment.local_rank()
    if started == devices * num_nodes and local_rank < devices:
        environment.validate_settings(num_devices=devices, num_nodes=num_nodes)
        return
    raise ValueError(
        f"the job has {started} processes, at least {local_rank + 1} of them on this node, but"
        f" devices={devices} x num_nodes={num_nodes} is {devices * num_nodes}: set devices to the"
        " number of processes of a node (--nproc-per-node of torchrun, --ntasks-per-node of srun,"
        " which SLURM's jobs must be started with) and num_nodes to the number of nodes"
    )


def check_emulation(processes: int) -> None:
    """Refuse an emulated cluster where it cannot run."""
    if processes != 1:
        raise ValueError(
            f"emulate=... plays one rank in one process, but devices x num_nodes is {processes}:"
            " use devices=1, num_nodes=1"
        )


def check_module(
    module: Any, topology: Topology, placement: Placement, split: Sequence[int] | None = None
) -> None:
    """Refuse a module that cannot be trained with two strands, where chunks lie so."""
    if not isinstance(module, DualStrandMixin):
        raise ValueError(
            f"DHellamStrategy cannot train {type(module).__name__}: make it a DualStrandMixin"
            " (lightning_dhellam.DualStrandMixin), which says what the model is"
        )
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__}.automatic_optimization=False: DHellamStrategy runs backward"
            " and steps the optimizer itself; leave automatic_optimization at True"
        )
    if getattr(module, "model_config", None) is None:
        raise ValueError(
            f"{type(module).__name__} has no model_config: set self.model_config in __init__, for"
            ' example to lightning_dhellam.models.preset("llama-3-8b")'
        )
    module.model_config.validate(
        topology.tp_size, topology.ep_size, topology.etp_size, topology.cp_size
    )
    pipeline_split(module.model_config, placement, split)


def check_plan_file(plan: str, conditions: Mapping[str, Any]) -> None:
    """Refuse a plan file that was made for another model or other sizes.

    `conditions` are without the device, which each rank compares when it has one.
    """
    if plan.endswith(".json"):
        plans = PlanFile.load(plan)
        plans.check({"device": plans.conditions.get("device"), **conditions}, plan)


def check_ckpt_path(
    path: Any, config: ModelConfig, processes: int, *, training: bool, resume_settings: str
) -> None:
    """Refuse the path of a checkpoint that is none, or is of another model than `config`.

    What Lightning looks for is not known yet.
    """
    spelt = os.fspath(path) if path else ""
    if spelt and spelt.split(":")[0] not in _RESOLVED_BY_LIGHTNING:
        path = place_of(spelt, f"ckpt_path={spelt}", processes)
        check_model(path, config, training=training, resume_settings=resume_settings)


def check_data(module: Any, data: Any, topology: Topology) -> None:
    """Refuse data that does not suit the model. Reads what an IndexedDataModule says of itself."""
    config = module.model_config
    length = getattr(data, "sequence_length", None)
    if length is not None:
        check_length(length, config.max_sequence_length, topology.tp_size, topology.cp_size)
    vocab_size = getattr(data, "vocab_size", None)
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise ValueError(
            f"the data's tokenizer has {vocab_size} tokens, but the model has"
            f" vocab_size={config.vocab_size}: set vocab_size={vocab_size}"
            f" (model.overrides.vocab_size of a recipe), or use the model's own tokenizer"
        )


def check_optimizer(module: DualStrandMixin, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that steps other parameters than those that get gradients, or that
    computes gradients itself."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"configure_optimizers returned {type(optimizer).__name__}, whose step() computes the"
            " loss as often as it likes: DHellamStrategy computes it once, before the step; use an"
            " optimizer that needs no closure, such as AdamW"
        )
    inside = {id(p): name for name, p in module.model.named_parameters() if p.requires_grad}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    outside = [
        name for name, p in module.named_parameters() if p.requires_grad and id(p) not in inside
    ]
    if outside:
        raise ValueError(
            f"parameter '{outside[0]}' is not part of {type(module).__name__}.model, so no"
            " strand computes its gradient: put it into a layer of the model, or freeze it"
        )
    missing = [name for key, name in inside.items() if key not in stepped]
    if missing:
        raise ValueError(
            f"configure_optimizers leaves out '{missing[0]}': give the optimizer every"
            " parameter that requires a gradient, or freeze it with requires_grad_(False)"
        )


def stuck_average(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> str:
    """Why an optimizer's average of squares cannot fall where it is kept in `dtype`; empty if it
    can.

    A number that is multiplied by `beta2` rounds to itself if it loses less than half of its last
    bit. See findings/torch-adamw-in-bf16-never-forgets-a-spike.sh (torch 2.13.0).
    """
    least = torch.finfo(dtype).eps / 2
    for group in optimizer.param_groups:
        betas = group.get("betas")
        if isinstance(betas, tuple | list) and len(betas) == 2 and 0 < 1 - betas[1] < least:
            return (
                f"betas={tuple(betas)} with averages in {str(dtype).removeprefix('torch.')}: that"
                " of squared gradients may stay where a spike has put it, for it rounds to itself;"
                f" use a second beta of at most {1 - 1.25 * least:.3f}, or precision='bf16-mixed'"
            )
    return ""
