"""`recompute='auto'`: backward makes again what the memory of the device asks for, at least time.

A search chooses by measured times. Without one it is chosen before the first step, by FLOPs and
bytes of the operators, for a share of the memory: what is held besides activations is then counted,
as weights, their gradients in fp32 and an optimizer's state of 12 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dhellam.agreed import AgreedEngine
from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.collectives import largest, of_all_ranks, together
from lightning_dhellam.plan import Builder, GraphPair

if TYPE_CHECKING:
    from lightning_dhellam.search.model import Costs

SHARE = 0.9
"""Of the memory, without a search."""
_MEASURED_SHARE = 0.97
"""Of the memory, when it is measured what the run takes."""
_UNDER_WAY = 8
"""Tensors that stages hand over and have not let go: two that were received ahead, four that the
last two walks have sent, and two that are carried on."""
_STATE = 12
"""Bytes of an optimizer's state for each parameter: two moments and a master weight in fp32."""


def by_rule(
    agreed: AgreedEngine,
    model: CausalLM,
    pieces: Sequence[MicroBatch],
    limit: int | None,
    shards: int,
) -> None:
    """Choose without measured times. Every rank must call this, before its first step.

    Args:
        agreed: what is chosen for.
        model: that is trained.
        pieces: the micro-batches of a step.
        limit: of the memory of this rank, in bytes; None for that of its device.
        shards: ranks that share the optimizer's state.

    Raises:
        ValueError: nothing fits; on all ranks.
    """
    from lightning_dhellam.search.model import Costs

    tokens = tokens_of(agreed, pieces)
    held = held_bytes(model, shards)
    graphs = [graph for pair in agreed.engine.layers for graph in (pair.forward, pair.backward)]
    room = _room(agreed, limit, held, SHARE)
    costs = Costs.nominal(graphs, tokens)
    take(agreed, costs, len(pieces), tokens, room, agreed.engine.builder)


def when_measured(
    agreed: AgreedEngine, pieces: Sequence[MicroBatch], limit: int | None, held: float, costs: Costs
) -> None:
    """Choose by what a profile has measured. Every rank must call this, between two steps.

    Args:
        agreed: what is chosen for.
        pieces: the micro-batches of a step.
        limit: of the memory of this rank, in bytes; None for that of its device.
        held: bytes besides slots; see `measured_bytes`.
        costs: of the operators that there are.

    Raises:
        ValueError: nothing fits; on all ranks.
    """
    room = _room(agreed, limit, held, _MEASURED_SHARE)
    take(agreed, costs, len(pieces), tokens_of(agreed, pieces), room, None)


def measured_bytes(agreed: AgreedEngine, model: CausalLM, shards: int) -> float:
    """Bytes that this rank has taken so far besides slots; for a call between steps.

    On a GPU those that it holds, and what kernels take besides slots; on a CPU `held_bytes`.
    """
    device = agreed.context.device
    if device.type != "cuda":
        return held_bytes(model, shards)
    held = float(torch.cuda.memory_allocated(device))
    slots = agreed.engine.lanes.ledger.peak_bytes
    return held + max(0.0, torch.cuda.max_memory_allocated(device) - held - slots)


def tokens_of(agreed: AgreedEngine, pieces: Sequence[MicroBatch]) -> int:
    """Tokens of a micro-batch: the most of all ranks."""
    most = torch.tensor([max(float(piece.tokens) for piece in pieces)], dtype=torch.float64)
    return int(largest(most, agreed.context.world_group))


def held_bytes(model: CausalLM, shards: int) -> float:
    """Bytes that this rank holds from step to step, whatever its activations are."""
    held = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return held + trained * (4 + _STATE / shards)


def _room(agreed: AgreedEngine, limit: int | None, held: float, share: float) -> float:
    """Bytes that activations may take: on the rank of this stage that has least."""
    device = agreed.context.device
    if limit is None and device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory
    room = torch.inf if limit is None else limit * share - held
    least = largest(torch.tensor([-room], dtype=torch.float64), agreed.context.stage_group)
    return -float(least)


def take(
    agreed: AgreedEngine,
    costs: Costs,
    micro_batches: int,
    tokens: int,
    room: float,
    builder: Builder | None,
) -> None:
    """Choose for `room` bytes, install it on all ranks, and say why."""
    from lightning_dhellam.search.recompute import choose, moments

    engine, world = agreed.engine, agreed.context.world_group
    kept = agreed.lowered("none")
    layers = agreed.suited(kept.layers)
    room -= _UNDER_WAY * tokens * max(map(_received, layers))
    legs = kept.stage.step(micro_batches).legs
    found = together(
        partial(
            choose,
            engine.layers,
            layers,
            moments(legs, len(layers)),
            costs,
            limit=room,
            tokens=tokens,
            free=[bool(key) for key in kept.keys],
            builder=builder,
        ),
        world,
    )
    mine = {
        key: sorted(slots) or "none"
        for key, slots in zip(kept.keys, found.slots, strict=True)
        if key
    }
    known = of_all_ranks((mine, found, room), world)
    every = {key: value for other, _, _ in known for key, value in other.items()}
    agreed.use_recompute(dict(sorted(every.items())))
    _, tightest, room = min(known, key=lambda one: one[2] - one[1].kept_bytes)
    count = sum(value != "none" for value in every.values())
    rank_zero_info(
        f"recompute: activations need {_size(tightest.kept_bytes)} and may take {_size(room)}, so"
        f" {count} of {len(every)} layers make some again: {_size(tightest.peak_bytes)}, and"
        f" {tightest.seconds / tightest.kept - 1:.1%} more time"
    )


def _received(layer: GraphPair) -> float:
    """Bytes per token of what another stage sends a layer."""
    slots = (slot for operator in layer.forward.receives for slot in operator.writes)
    return sum(layer.forward.bytes_per_token.get(slot, 0.0) for slot in slots)


def _size(size: float) -> str:
    if size == torch.inf:
        return "all that they need"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
