"""Who this process is in the cluster: one explicit value instead of Megatron's global state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import GlobalMemoryBuffer
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout

from lightning_dhellam.parallel import nccl
from lightning_dhellam.parallel.channels import ChannelKey, open_channels
from lightning_dhellam.parallel.collectives import Transport, of_all_ranks
from lightning_dhellam.parallel.cpu import megatron_device
from lightning_dhellam.parallel.duplex import open_duplex
from lightning_dhellam.parallel.emulate import Cluster, is_emulated
from lightning_dhellam.parallel.link import EmulatedLink


def check_sizes(
    world_size: int,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_parallel_size: int = 1,
) -> None:
    """Raise ValueError unless ``world_size`` processes can be cut into groups of these sizes."""
    sizes = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "context_parallel_size": context_parallel_size,
        "expert_parallel_size": expert_parallel_size,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be an integer of at least 1")
    model_sizes = {name: size for name, size in sizes.items() if name != "expert_parallel_size"}
    model = tensor_parallel_size * pipeline_parallel_size * context_parallel_size
    if world_size % model:
        given = _spell(model_sizes)
        raise ValueError(
            f"{given} needs a multiple of {model} processes, but the world size is {world_size}: "
            f"set devices × num_nodes to a multiple of {model}, or lower "
            f"{_remedy(model_sizes)} to a divisor of {world_size}"
        )
    expert_model = expert_parallel_size * tensor_parallel_size * pipeline_parallel_size
    if world_size % expert_model:
        raise ValueError(
            f"{_spell(sizes)}: experts are spread over groups of {expert_model} processes, which "
            f"does not divide the world size {world_size}: lower expert_parallel_size"
        )


def _spell(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


def _remedy(sizes: dict[str, int]) -> str:
    names = [name for name, size in sizes.items() if size > 1]
    return " × ".join(names)


class _Asked(NamedTuple):
    """What groups were made for: `sizes` of tensor, pipeline, context and expert parallelism."""

    world: ProcessGroup | None
    device: torch.device
    sizes: tuple[int, int, int, int]
    timeout: timedelta
    tuned: bool


@dataclass(frozen=True)
class ParallelContext:
    """The groups of this process, its rank in each, and the device it computes on.

    ``links`` holds the emulated links by communicator, of an emulated cluster only. ``channels``
    holds the communicators between neighbouring pipeline stages, and ``pipeline_split`` the layers
    of each chunk if they were given. Of a pipeline ``alone`` is the group of this rank only.
    ``duplex`` carries tensor-parallel collectives over gloo; None where they do not take it.

    ``groups`` is what Megatron's modules take as ``pg_collection``. ``tp_group`` and the other
    named groups are None only when torch.distributed is not initialised; then every size is 1.
    With ``asked`` and ``megatron_state`` another context takes over the groups.
    """

    device: torch.device
    groups: ProcessGroupCollection
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    tp_group: ProcessGroup | None
    dp_group: ProcessGroup | None
    pp_group: ProcessGroup | None
    cp_group: ProcessGroup | None
    ep_group: ProcessGroup | None
    links: Mapping[str, EmulatedLink] = field(default_factory=dict)
    channels: Mapping[ChannelKey, ProcessGroup] = field(default_factory=dict)
    pipeline_split: tuple[int, ...] = ()
    alone: ProcessGroup | None = None
    duplex: Transport | None = None
    asked: _Asked | None = field(default=None, repr=False)
    megatron_state: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def create(
        cls,
        device: torch.device,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        cluster: Cluster | None = None,
        pipeline_split: tuple[int, ...] = (),
        timeout: timedelta = default_pg_timeout,
        tuned: bool = True,
    ) -> ParallelContext:
        """Cut the initialised world into Megatron's groups: tensor ranks adjacent, then context,
        data and pipeline ranks. With `cluster` the world is emulated, and its links are made.
        `pipeline_split` gives the layers of each chunk, which otherwise the model balances.
        A collective that a rank does not join fails after `timeout`.
        NCCL's communicators are set up for two strands (`nccl.yaml`) unless `tuned` is false.
        Groups that the last context has kept are taken over where they are the same.
        Raises ValueError when the sizes do not fit the world."""
        assert dist.is_initialized(), "torch.distributed must be initialised first"
        sizes = (
            tensor_parallel_size,
            pipeline_parallel_size,
            context_parallel_size,
            expert_parallel_size,
        )
        check_sizes(dist.get_world_size(), *sizes)
        asked = _Asked(dist.group.WORLD, device, sizes, timeout, tuned)
        context = replace(_take_over(asked) or cls._new(asked), pipeline_split=pipeline_split)
        if cluster is None:
            return context
        links = {name: EmulatedLink(link, device) for name, link in cluster.links.items()}
        return replace(context, links=links)

    @classmethod
    def _new(cls, asked: _Asked) -> ParallelContext:
        device, timeout, (tp, pp, cp, ep) = asked.device, asked.timeout, asked.sizes
        by_nccl = dist.get_backend() == "nccl" and asked.tuned
        before = dict(vars(parallel_state))
        with megatron_device(device):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                # A second set, of gloo groups, serves only a checkpoint format that we do not use.
                create_gloo_process_groups=False,
                distributed_timeout_minutes=timeout / timedelta(minutes=1),
                nccl_communicator_config_path=str(nccl.CONFIGURATION) if by_nccl else None,
            )
        now = vars(parallel_state).items()
        state = {name: value for name, value in now if value is not before.get(name, value)}
        context = cls._of_groups(device, ProcessGroupCollection.use_mpu_process_groups())
        return replace(
            context,
            channels=open_channels(context.groups.pp, context.world_size, device, timeout),
            alone=_group_of_this_rank() if pp > 1 else None,
            duplex=open_duplex(context.groups.tp, context.world_size, device, timeout),
            asked=asked,
            megatron_state=state,
        )

    @property
    def model_rank(self) -> int:
        """Rank within a pipeline stage, over data and tensor parallelism.

        It is the same on every stage of a pipeline, so what depends on it, such as the random
        numbers of a micro-batch, does not depend on the number of stages.
        """
        return self.rank % (self.world_size // self.pp_size)

    @property
    def tp_transport(self) -> Transport | None:
        """What carries tensor-parallel collectives; None for the group's own."""
        return self.links.get("tp") or self.duplex

    @property
    def link_processors(self) -> int:
        """Multiprocessors that a collective of tensor parallelism occupies."""
        if self.links:
            return max(emulated.link.sms for emulated in self.links.values())
        by_nccl = self.tp_group is not None and dist.get_backend(self.tp_group) == "nccl"
        return nccl.processors() if by_nccl and self.tp_size > 1 else 0

    @property
    def world_group(self) -> ProcessGroup | None:
        """All ranks; None where the others do not exist."""
        return None if self.emulated else dist.group.WORLD

    @property
    def emulated(self) -> bool:
        """Whether the other ranks do not exist, so that nothing may depend on their answers."""
        return is_emulated()

    @classmethod
    def single(cls, device: torch.device) -> ParallelContext:
        """This process alone, for a model under one of Lightning's ordinary strategies.

        Works with and without torch.distributed; in a larger world (DDP, say) every process is
        rank 0 of its own groups of one, and their common training is the strategy's business.
        """
        group: ProcessGroup
        if dist.is_initialized():
            group = _group_of_this_rank()
        else:
            group = ProcessGroup(0, 1)  # type: ignore[call-arg]
        names = [field.name for field in fields(ProcessGroupCollection) if field.name != "hcp"]
        return cls._of_groups(device, ProcessGroupCollection(**dict.fromkeys(names, group)))

    @classmethod
    def _of_groups(cls, device: torch.device, groups: ProcessGroupCollection) -> ParallelContext:
        connected = dist.is_initialized()
        values: dict[str, ProcessGroup | int | None] = {}
        for name in ("tp", "dp", "pp", "cp", "ep"):
            group: ProcessGroup = getattr(groups, name)
            values[f"{name}_rank"] = group.rank()
            values[f"{name}_size"] = group.size()
            values[f"{name}_group"] = group if connected else None
        return cls(
            device=device,
            groups=groups,
            rank=dist.get_rank() if connected else 0,
            world_size=dist.get_world_size() if connected else 1,
            **values,  # type: ignore[arg-type]
        )

    @contextmanager
    def megatron(self) -> Iterator[None]:
        """Enter around everything that runs Megatron code for this context: construction, forward,
        backward, reduction of gradients, optimizer step. Re-entrant; nothing remains afterwards.
        """
        with megatron_device(self.device):
            if dist.is_initialized():
                yield
            else:
                with _groups_without_distributed():
                    yield

    def destroy(self, *, keep: bool = False) -> None:
        """Forget Megatron's global groups; torch.distributed stays up, it is not ours.

        The groups stay open, because models that are left use them. With `keep` the next context
        takes them over, instead of opening as many again. Only for runs that ended well: after
        others a rank may have left a transfer in them that no one ends.
        """
        global _kept
        _kept = self if keep else None
        parallel_state.destroy_model_parallel()
        for value in self.megatron_state.values():
            if isinstance(value, GlobalMemoryBuffer):
                value.buffer.clear()


_kept: ParallelContext | None = None
"""What the next context may take over."""


def _take_over(asked: _Asked) -> ParallelContext | None:
    """What was kept, if every rank has kept what is asked for. Every rank must call this."""
    global _kept
    kept, _kept = _kept, None
    if is_emulated():
        return None
    fit = of_all_ranks(kept is not None and kept.asked == asked, asked.world)
    if kept is None or not all(fit):
        return None
    vars(parallel_state).update(kept.megatron_state)
    return kept


def _group_of_this_rank() -> ProcessGroup:
    group: ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return group


@contextmanager
def _groups_without_distributed() -> Iterator[None]:
    """Let Megatron's functions accept our groups of one while torch.distributed is down.

    They drop every group they are given when `is_initialized` is false, then assert that they have
    one; with a group of size 1 they call no collective.
    """
    original = dist.is_initialized
    dist.is_initialized = lambda: True
    try:
        yield
    finally:
        dist.is_initialized = original
