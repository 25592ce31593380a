"""Who this process is in the cluster: one explicit value instead of Megatron's global state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from lightning_dhellam.parallel.topology import LANES, Topology


class _Asked(NamedTuple):
    """What groups were made for."""

    world: ProcessGroup | None
    device: torch.device
    topology: Topology
    timeout: timedelta
    tuned: bool


@dataclass(frozen=True)
class ParallelContext:
    """The groups of this process, its place in the topology, and the device it computes on.

    ``links`` holds the emulated links by communicator, of an emulated cluster only. ``channels``
    holds the communicators between neighbouring pipeline stages, and ``pipeline_split`` the layers
    of each chunk if they were given. Of a pipeline ``alone`` is the group of this rank only.
    ``duplex`` carries tensor-parallel collectives over gloo; None where they do not take it.

    ``groups`` is what Megatron's modules take as ``pg_collection``. ``tp_group`` and the other
    named groups are None only when torch.distributed is not initialised; then every size is 1.
    With ``asked`` and ``megatron_state`` another context takes over the groups.
    """

    device: torch.device
    topology: Topology
    groups: ProcessGroupCollection
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
        topology = Topology(
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            tp_size=tensor_parallel_size,
            pp_size=pipeline_parallel_size,
            cp_size=context_parallel_size,
            ep_size=expert_parallel_size,
        )
        asked = _Asked(dist.group.WORLD, device, topology, timeout, tuned)
        context = replace(_take_over(asked) or cls._new(asked), pipeline_split=pipeline_split)
        if cluster is None:
            return context
        links = {name: EmulatedLink(link, device) for name, link in cluster.links.items()}
        return replace(context, links=links)

    @classmethod
    def _new(cls, asked: _Asked) -> ParallelContext:
        device, topology, timeout = asked.device, asked.topology, asked.timeout
        by_nccl = dist.get_backend() == "nccl" and asked.tuned
        before = dict(vars(parallel_state))
        with megatron_device(device):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=topology.tp_size,
                pipeline_model_parallel_size=topology.pp_size,
                context_parallel_size=topology.cp_size,
                expert_model_parallel_size=topology.ep_size,
                # A second set, of gloo groups, serves only a checkpoint format that we do not use.
                create_gloo_process_groups=False,
                distributed_timeout_minutes=timeout / timedelta(minutes=1),
                nccl_communicator_config_path=str(nccl.CONFIGURATION) if by_nccl else None,
            )
        now = vars(parallel_state).items()
        state = {name: value for name, value in now if value is not before.get(name, value)}
        groups = ProcessGroupCollection.use_mpu_process_groups()
        _check_order(topology, groups)
        context = cls._of_groups(device, topology, groups)
        return replace(
            context,
            channels=open_channels(context.groups.pp, topology, device, timeout),
            alone=_group_of_this_rank() if topology.pp_size > 1 else None,
            duplex=open_duplex(context.groups.tp, topology, device, timeout),
            asked=asked,
            megatron_state=state,
        )

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
        return nccl.processors() if by_nccl and self.topology.tp_size > 1 else 0

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
        the only rank of its own topology, and their common training is the strategy's business.
        """
        group: ProcessGroup
        if dist.is_initialized():
            group = _group_of_this_rank()
        else:
            group = ProcessGroup(0, 1)  # type: ignore[call-arg]
        names = [field.name for field in fields(ProcessGroupCollection) if field.name != "hcp"]
        return cls._of_groups(
            device, Topology(), ProcessGroupCollection(**dict.fromkeys(names, group))
        )

    @classmethod
    def _of_groups(
        cls, device: torch.device, topology: Topology, groups: ProcessGroupCollection
    ) -> ParallelContext:
        if not dist.is_initialized():
            return cls(device, topology, groups, None, None, None, None, None)
        return cls(device, topology, groups, groups.tp, groups.dp, groups.pp, groups.cp, groups.ep)

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


def _check_order(topology: Topology, groups: ProcessGroupCollection) -> None:
    """Fail where Megatron has cut the world in another way than `Topology` says."""
    for lane in LANES:
        ranks = dist.get_process_group_ranks(getattr(groups, lane.value))
        assert ranks in topology.groups(lane) and topology.rank in ranks, f"{lane}: {ranks}"


def _group_of_this_rank() -> ProcessGroup:
    group: ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return group


@contextmanager
def _groups_without_distributed() -> Iterator[None]:
    """Let Megatron's functions accept our groups of one while torch.distributed is down.

    They drop every group they are given when `is_initialized` is false, then assert that they have
    one; with a group of size 1 they call no collective. Who is initialised is asked for its rank,
    before every message of the log.
    """
    alone: dict[str, Callable[..., object]] = {
        "is_initialized": lambda: True,
        "get_rank": lambda group=None: 0,
        "get_world_size": lambda group=None: 1,
    }
    originals = {name: getattr(dist, name) for name in alone}
    for name, answer in alone.items():
        setattr(dist, name, answer)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
