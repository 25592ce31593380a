"""A rank of a run that is only planned: its groups have sizes, and nobody is in them.

What is built on it is this rank's share of a model, as Megatron-core itself cuts it; what is
launched on it sends nothing. Needs no processes, and may be made of ranks of any number while a run
of another shape is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel.communicator import Communicator, Communicators
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.groups import OpenGroups
from lightning_dhellam.parallel.stand_in import EmulatedGroup
from lightning_dhellam.parallel.topology import LANES, Topology
from lightning_dhellam.plan import Collective
from lightning_dhellam.plan.placement import Placement


class Nowhere:
    """Carries nothing: what would be received has its memory, and mostly no values."""

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """See `Transport`. All ranks have what this one has: counts of rows are read then."""
        out.view(-1, *x.shape).copy_(x)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        """See `Transport`."""

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> None:
        """See `Transport`."""

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> None:
        """See `Transport`."""

    def processors(self, collective: Collective) -> int:
        """See `Transport`."""
        return 0


def planned_context(
    topology: Topology,
    device: torch.device,
    pipeline_split: tuple[int, ...] = (),
    placement: Placement | None = None,
) -> ParallelContext:
    """The context of rank `topology.rank` of a run that is not there.

    Args:
        topology: the sizes of the run, and which of its ranks this is.
        device: that it would compute on.
        pipeline_split: layers of each chunk, if they were given.
        placement: which stage holds which chunk; folded if not given.
    """
    placement = placement or Placement.folded(topology.pp_size)
    return ParallelContext(
        device,
        topology,
        OpenGroups(_collection(topology)),
        _communicators(topology),
        edges=dict.fromkeys(placement.edges(tied=True), Nowhere()),
        placement=placement,
        pipeline_split=pipeline_split,
        alone=_group(0, 1) if topology.pp_size > 1 else None,
        planned=True,
    )


def _group(rank: int, size: int) -> ProcessGroup:
    return EmulatedGroup(rank, size)


def _collection(t: Topology) -> ProcessGroupCollection:
    """Megatron's groups. Of those that nothing of ours reads only the size matters."""
    whole = (t.rank, t.world_size)
    stage = (t.rank_in_stage, t.stage_size)
    replicas = (t.replica, t.replicas)
    experts = (t.expert_dp_rank, t.expert_dp_size)
    sizes: dict[str, tuple[int, int]] = {
        "tp": (t.tp_rank, t.tp_size),
        "pp": (t.pp_rank, t.pp_size),
        "cp": (t.cp_rank, t.cp_size),
        "dp": (t.dp_rank, t.dp_size),
        "ep": (t.ep_rank, t.ep_size),
        "mp": (t.tp_rank + t.tp_size * t.pp_rank, t.tp_size * t.pp_size),
        "embd": (0, 1),
        "pos_embd": (0, 1),
        "tp_cp": (t.tp_rank + t.tp_size * t.cp_rank, t.tp_size * t.cp_size),
        "dp_cp": replicas,
        "intra_dp_cp": replicas,
        "tp_dp_cp": stage,
        "expt_tp": (t.etp_rank, t.etp_size),
        "tp_ep": (t.etp_rank + t.etp_size * t.ep_rank, t.etp_size * t.ep_size),
        "tp_ep_pp": (
            t.etp_rank + t.etp_size * (t.ep_rank + t.ep_size * t.pp_rank),
            t.etp_size * t.ep_size * t.pp_size,
        ),
        "expt_dp": experts,
        "intra_expt_dp": experts,
        "inter_dist_opt": (0, 1),
        "intra_dist_opt": whole,
    }
    groups: dict[str, Any] = {name: _group(*place) for name, place in sizes.items()}
    return ProcessGroupCollection(**groups)


def _communicators(topology: Topology) -> Communicators:
    ranks = {lane: getattr(topology, f"{lane.value}_rank") for lane in LANES}
    return {
        lane: Communicator(
            lane, _group(rank, topology.size(lane)), Nowhere(), rank, topology.size(lane)
        )
        for lane, rank in ranks.items()
    }
