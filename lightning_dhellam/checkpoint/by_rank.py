"""Reads checkpoints of format 1, which version 0.1 wrote: a file per rank, for the same sizes only.

weights-00001.pt of model-parallel rank 1
experts-00002.pt experts that rank 2 of tensor, expert and pipeline parallelism holds, by
                 their numbers among all
state-00003.pt   optimizer state of rank 3
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_dhellam.checkpoint import content
from lightning_dhellam.checkpoint.description import (
    ALONE,
    check_same,
    check_settings,
    read_topology,
    sizes_of,
)
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.remote import Folder

_OF_REPLICAS = ("context_parallel_size", "data_parallel_size", "expert_parallel_size")
"""Sizes that weights do not depend on."""


def load_weights(
    path: Folder, context: ParallelContext, experts: Collection[str] = ()
) -> dict[str, Any]:
    """This model-parallel rank's weights, and those of its `experts`, by their names among all.

    Data, context and expert-parallel sizes may have changed.

    Raises:
        ValueError: the checkpoint was written with other model-parallel sizes, or is damaged.
    """
    mine = sizes_of(context)
    for name in _OF_REPLICAS:
        del mine[name]
    check_same(path, mine)
    weights = content.read(path / _weights_name(context))
    return weights | _load_experts(path, context, frozenset(experts)) if experts else weights


def _load_experts(path: Folder, context: ParallelContext, names: frozenset[str]) -> dict[str, Any]:
    topology, parts = context.topology, int(read_topology(path).get("expert_parallel_size", 1))
    if parts == topology.ep_size:
        return content.read(path / _experts_name(context, topology.ep_rank))
    found: dict[str, Any] = {}
    # The ranks' experts are in the order of their numbers.
    first = topology.ep_rank * parts // topology.ep_size
    for part in (*range(first, parts), *range(first)):
        if names <= found.keys():
            break
        saved = content.read(path / _experts_name(context, part, parts))
        found |= {name: value for name, value in saved.items() if name in names}
    return found


def load_state(
    path: Folder, context: ParallelContext, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """This rank's optimizer state, for a run with `settings`.

    Raises:
        ValueError: the checkpoint was written with other sizes or settings, or without optimizer
            state, or is damaged.
    """
    check_same(path, sizes_of(context), ALONE)
    check_settings(path, settings)
    return content.read(path / _state_name(context))


def _weights_name(context: ParallelContext) -> str:
    topology = context.topology
    return f"weights-{topology.tp_rank + topology.pp_rank * topology.tp_size:05d}.pt"


def _experts_name(context: ParallelContext, part: int, parts: int | None = None) -> str:
    """The file of one of the `parts` of the experts; of this run's number of parts if not given."""
    topology = context.topology
    place = part + (parts or topology.ep_size) * topology.pp_rank
    return f"experts-{topology.etp_rank + topology.etp_size * place:05d}.pt"


def _state_name(context: ParallelContext) -> str:
    return f"state-{context.topology.rank:05d}.pt"
