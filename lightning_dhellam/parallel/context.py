"""Who this process is in the cluster: one explicit value instead of Megatron's global state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout

from lightning_dhellam.parallel.choice import AUTO, CROSSING, check_transport, choose_transport
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.communicator import Communicators, alone, open_communicators
from lightning_dhellam.parallel.cpu import megatron_device
from lightning_dhellam.parallel.edges import Edges, open_edges, parts_of
from lightning_dhellam.parallel.emulate import Cluster
from lightning_dhellam.parallel.groups import (
    OpenGroups,
    everywhere,
    group_of_hosts,
    group_of_this_rank,
    open_groups,
    without_distributed,
)
from lightning_dhellam.parallel.link import EmulatedLink, play_links
from lightning_dhellam.parallel.stand_in import is_emulated
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.parallel.transport import Transport
from lightning_dhellam.plan import GraphPair, Lane
from lightning_dhellam.plan.placement import Placement


class _Asked(NamedTuple):
    """What groups were made for."""

    world: ProcessGroup | None
    device: torch.device
    topology: Topology
    timeout: timedelta
    tuned: bool
    transports: Mapping[Lane, str]
    crossing: Mapping[Lane, int]
    placement: Placement
    tied: bool


@dataclass(frozen=True)
class ParallelContext:
    """Who this process is: its place among the ranks, and by what it talks to them.

    Attributes:
        device: that computes.
        topology: the sizes of the run, and this rank's place.
        megatron_groups: Megatron's process groups, of which `groups` is what its modules take.
        communicators: what carries collectives, by lane.
        edges: what carries transfers between the stages of a pipeline.
        placement: which of those holds which chunk of the layers.
        pipeline_split: layers of each chunk, if they were given.
        alone: the group of this rank only, in a pipeline.
        carried: what carries exchanges of `cp` and `pp` lanes and why, where there was a choice.
        host_group: all ranks, for values in host memory, so that nothing waits for a device; None
            where there are no others.
        asked: what the groups were made for, with which the next context may take them over.
        planned: whether there are no processes: this is a rank of a run that is only planned.
    """

    device: torch.device
    topology: Topology
    megatron_groups: OpenGroups
    communicators: Communicators
    edges: Edges = field(default_factory=dict)
    placement: Placement = field(default_factory=lambda: Placement.folded(1))
    pipeline_split: tuple[int, ...] = ()
    alone: ProcessGroup | None = None
    carried: Mapping[Lane, str] = field(default_factory=dict)
    host_group: ProcessGroup | None = None
    asked: _Asked | None = field(default=None, repr=False)
    planned: bool = False

    @classmethod
    def create(
        cls,
        device: torch.device,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        expert_tensor_parallel_size: int | None = None,
        cluster: Cluster | None = None,
        pipeline_split: tuple[int, ...] = (),
        timeout: timedelta = default_pg_timeout,
        tuned: bool = True,
        context_transport: str = AUTO,
        pipeline_transport: str = AUTO,
        crossing: Mapping[Lane, int] | None = None,
        placement: Placement | None = None,
        tied: bool = True,
    ) -> ParallelContext:
        """Cut the initialised world into groups, in the order that `Topology` states.

        Every rank must call this. Groups that the last context has kept are taken over where they
        are the same.

        Args:
            device: that computes.
            tensor_parallel_size: see `Topology`, as the other sizes.
            pipeline_parallel_size: stages.
            context_parallel_size: ranks that share a sequence.
            expert_parallel_size: ranks that share experts.
            expert_tensor_parallel_size: ranks that share each expert: all that share a layer, if
                None, or 1.
            cluster: to emulate: this process has joined it, and its links are played.
            pipeline_split: layers of each chunk, which otherwise the model balances.
            timeout: after which a collective fails that a rank does not join.
            tuned: set NCCL's communicators up for two strands (`nccl.yaml`).
            context_transport: what carries exchanges between ranks that share a sequence: `auto`,
                `nccl` or `copy_engine`; see `choice`.
            pipeline_transport: what carries transfers between stages: one of the same.
            crossing: bytes of what the ranks of a lane hand on parts of: of `cp` a layer's keys and
                values, of `pp` the hidden states between layers. With such a part `auto` measures.
            placement: which stage holds which chunk of the layers; folded if not given.
            tied: whether embedding and output layer may have one weight. Without, the stages that
                have them are not connected for its sake.

        Raises:
            ValueError: the sizes do not fit the world, or the transport not the device.
        """
        assert dist.is_initialized(), "torch.distributed must be initialised first"
        topology = Topology(
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            tp_size=tensor_parallel_size,
            pp_size=pipeline_parallel_size,
            cp_size=context_parallel_size,
            ep_size=expert_parallel_size,
            etp_size=(
                tensor_parallel_size
                if expert_tensor_parallel_size is None
                else expert_tensor_parallel_size
            ),
        )
        transports = {Lane.CP: context_transport, Lane.PP: pipeline_transport}
        for lane, name in transports.items():
            check_transport(lane, name, device.type, emulated=cluster is not None)
        asked = _Asked(
            dist.group.WORLD,
            device,
            topology,
            timeout,
            tuned,
            transports,
            crossing or {},
            placement or Placement.folded(pipeline_parallel_size),
            tied,
        )
        context = replace(_take_over(asked) or cls._new(asked), pipeline_split=pipeline_split)
        if cluster is None:
            return context
        links = cluster.links_of(topology)
        played = play_links(links, context.groups, context.communicators, device)
        return replace(context, communicators=played)

    @classmethod
    def _new(cls, asked: _Asked) -> ParallelContext:
        device, topology, timeout = asked.device, asked.topology, asked.timeout
        opened = open_groups(topology, device, timeout, tuned=asked.tuned)
        groups = opened.collection
        communicators = dict(open_communicators(topology, groups, device, timeout))
        carried = {}
        for lane, name in asked.transports.items():
            whole = asked.crossing.get(lane)
            communicators[lane], carried[lane] = choose_transport(
                name,
                communicators[lane],
                device,
                asked.world,
                CROSSING if whole is None else whole // (topology.tp_size * topology.cp_size),
                parts_of(asked.placement, tied=asked.tied) if lane is Lane.PP else 1,
                timeout,
            )
        between = communicators[Lane.PP].transport
        return cls(
            device=device,
            topology=topology,
            megatron_groups=opened,
            communicators=communicators,
            carried={lane: why for lane, why in carried.items() if why},
            edges=open_edges(topology, asked.placement, between, device, timeout, tied=asked.tied),
            placement=asked.placement,
            alone=group_of_this_rank() if topology.pp_size > 1 else None,
            host_group=group_of_hosts(topology, timeout),
            asked=asked,
        )

    @classmethod
    def single(cls, device: torch.device) -> ParallelContext:
        """This process alone, for a model under one of Lightning's ordinary strategies.

        Works with and without torch.distributed; in a larger world (DDP, say) every process is the
        only rank of its own topology, and their common training is the strategy's business.
        """
        group = group_of_this_rank()
        return cls(device, Topology(), OpenGroups(everywhere(group)), alone(group))

    @property
    def groups(self) -> ProcessGroupCollection:
        """Process groups as Megatron's modules take them (``pg_collection``)."""
        return self.megatron_groups.collection

    @property
    def in_a_run(self) -> bool:
        """Whether groups were made for a run, so that this is no process for itself."""
        return self.asked is not None

    @property
    def has_loss(self) -> bool:
        """Whether this rank's stage has the head, and so the loss."""
        return self.topology.pp_rank == self.placement.last

    @property
    def links(self) -> Mapping[Lane, EmulatedLink]:
        """The links that are emulated, by lane: none outside of an emulated cluster."""
        carried = {lane: each.transport for lane, each in self.communicators.items()}
        return {
            lane: transport
            for lane, transport in carried.items()
            if isinstance(transport, EmulatedLink) and transport.link is not None
        }

    def processors(self, layers: Iterable[GraphPair]) -> int:
        """Multiprocessors that a collective inside of `layers` occupies at most.

        Transfers between stages are none of them: no GEMM leaves processors to those.
        """
        graphs = (graph for pair in layers for graph in (pair.forward, pair.backward))
        used = {(each.lane, each.collective) for graph in graphs for each in graph.operators}
        return max(
            (self.communicators[lane].processors(one) for lane, one in used if one is not None),
            default=0,
        )

    @property
    def processes(self) -> int:
        """How many processes there really are: of an emulated cluster one."""
        return 1 if self.emulated or self.planned else self.topology.world_size

    @property
    def world_group(self) -> ProcessGroup | None:
        """All ranks; None where the others do not exist."""
        return None if self.emulated else dist.group.WORLD

    @property
    def stage_group(self) -> ProcessGroup | None:
        """The ranks that run the same layers; None where the others do not exist."""
        return self.world_group if self.topology.pp_size == 1 else self.groups.tp_dp_cp

    @property
    def emulated(self) -> bool:
        """Whether the other ranks do not exist, so that nothing may depend on their answers."""
        return is_emulated()

    def through(self, lane: Lane, transport: Transport) -> ParallelContext:
        """The same, with collectives of `lane` carried by `transport`."""
        changed = {lane: replace(self.communicators[lane], transport=transport)}
        return replace(self, communicators={**self.communicators, **changed})

    @contextmanager
    def megatron(self) -> Iterator[None]:
        """Enter around everything that runs Megatron code for this context: construction, forward,
        backward, reduction of gradients, optimizer step. Re-entrant; nothing remains afterwards.
        """
        with megatron_device(self.device):
            if dist.is_initialized() and not self.planned:
                yield
            else:
                with without_distributed():
                    yield

    def destroy(self, *, keep: bool = False) -> None:
        """Forget Megatron's global groups; torch.distributed stays up, it is not ours.

        The groups stay open, because models that are left use them. With `keep` the next context
        takes them over, instead of opening as many again. Only for runs that ended well: after
        others a rank may have left a transfer in them that no one ends.
        """
        global _kept
        _kept = self if keep else None
        self.megatron_groups.forget()


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
    kept.megatron_groups.restore()
    return kept
