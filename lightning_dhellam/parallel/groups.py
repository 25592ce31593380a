"""Megatron-core's process groups: opened, kept and forgotten here. Only here is its global state
read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import GlobalMemoryBuffer
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel import nccl
from lightning_dhellam.parallel.cpu import megatron_device
from lightning_dhellam.parallel.stand_in import is_emulated
from lightning_dhellam.parallel.topology import LANES, Topology


@dataclass(frozen=True)
class OpenGroups:
    """Megatron's groups of this rank, and its global state that holds them.

    Attributes:
        collection: what Megatron's modules take as ``pg_collection``.
        state: variables of `parallel_state`, with which another run takes the groups over.
    """

    collection: ProcessGroupCollection
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def restore(self) -> None:
        """Make these Megatron's groups again."""
        vars(parallel_state).update(self.state)

    def forget(self) -> None:
        """Empty Megatron's global state. The groups stay open."""
        parallel_state.destroy_model_parallel()
        for value in self.state.values():
            if isinstance(value, GlobalMemoryBuffer):
                value.buffer.clear()


def open_groups(
    topology: Topology, device: torch.device, timeout: timedelta, *, tuned: bool
) -> OpenGroups:
    """Cut the initialised world into Megatron's groups. Every rank must call this.

    Args:
        topology: of the world.
        device: that computes.
        timeout: after which a collective fails that a rank does not join.
        tuned: set NCCL's communicators up for two strands (`nccl.yaml`).
    """
    by_nccl = dist.get_backend() == "nccl" and tuned
    before = dict(vars(parallel_state))
    with megatron_device(device):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp_size,
            pipeline_model_parallel_size=topology.pp_size,
            context_parallel_size=topology.cp_size,
            expert_model_parallel_size=topology.ep_size,
            expert_tensor_parallel_size=topology.etp_size,
            # A second set, of gloo groups, serves only a checkpoint format that we do not use.
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout / timedelta(minutes=1),
            nccl_communicator_config_path=str(nccl.CONFIGURATION) if by_nccl else None,
        )
    now = vars(parallel_state).items()
    state = {name: value for name, value in now if value is not before.get(name, value)}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for lane in LANES:
        ranks = dist.get_process_group_ranks(getattr(groups, lane.value))
        assert ranks in topology.groups(lane) and topology.rank in ranks, f"{lane}: {ranks}"
    assert groups.expt_tp.size() == topology.etp_size
    assert groups.expt_dp.size() == topology.expert_dp_size
    return OpenGroups(groups, state)


def are_open() -> bool:
    """Whether somebody has opened Megatron's groups in this process."""
    return bool(parallel_state.model_parallel_is_initialized())


def group_of_hosts(topology: Topology, timeout: timedelta) -> ProcessGroup | None:
    """All ranks, by gloo: for values in host memory. None where there are no others.

    Every rank must call this.
    """
    if topology.world_size == 1 or is_emulated():
        return None
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def group_of_this_rank() -> ProcessGroup:
    """A group of this rank alone; without torch.distributed one that cannot communicate."""
    if not dist.is_initialized():
        return ProcessGroup(0, 1)  # type: ignore[call-arg]
    group: ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return group


def everywhere(group: ProcessGroup) -> ProcessGroupCollection:
    """A collection in which every group is `group`."""
    names = [each.name for each in fields(ProcessGroupCollection) if each.name != "hcp"]
    return ProcessGroupCollection(**dict.fromkeys(names, group))


@contextmanager
def without_distributed() -> Iterator[None]:
    """Let Megatron's functions accept groups of our own that torch.distributed does not know.

    They drop every group they are given when `is_initialized` is false, then assert that they have
    one; with a group of size 1 they call no collective. Who is initialised is asked for its rank,
    before every message of the log.
    """
    alone: dict[str, Callable[..., object]] = {
        "is_initialized": lambda: True,
        "get_rank": lambda group=None: 0 if group is None else group.rank(),
        "get_world_size": lambda group=None: 1 if group is None else group.size(),
    }
    originals = {name: getattr(dist, name) for name in alone}
    for name, answer in alone.items():
        setattr(dist, name, answer)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
