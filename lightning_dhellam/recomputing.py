"""`recompute='auto'`: backward makes again what the memory of the device asks for, at least time.

With `offload='auto'` slots wait on the host instead where that takes less.

A search chooses by measured times. Without one it is chosen before the first step, by FLOPs and
bytes of the operators, for a share of the memory: what weights, gradients and the optimizer hold is
then counted, as `memory.model_states` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dhellam.agreed import AgreedEngine
from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.layers import Lowered
from lightning_dhellam.memory.fitting import KNOWN_SHARE, SHARE, Fitted, fit, fit_by_rule
from lightning_dhellam.memory.limit import limit_of
from lightning_dhellam.parallel.collectives import largest, of_all_ranks, together

if TYPE_CHECKING:
    from lightning_dhellam.search.model import Costs


def by_rule(
    agreed: AgreedEngine, pieces: Sequence[MicroBatch], limit: int | None, states: int
) -> None:
    """Choose without measured times. Every rank must call this, before its first step.

    Args:
        agreed: what is chosen for.
        pieces: the micro-batches of a step.
        limit: of the memory of this rank, in bytes; None for that of its device.
        states: bytes of weights, gradients and the optimizer.

    Raises:
        ValueError: nothing fits; on all ranks.
    """
    engine = agreed.engine
    _take(
        agreed,
        partial(
            fit_by_rule,
            engine.layers,
            _kept(agreed),
            engine.builder,
            micro_batches=len(pieces),
            tokens=tokens_of(agreed, pieces),
            room=_room(agreed, limit, states, SHARE),
        ),
    )


def when_measured(
    agreed: AgreedEngine,
    pieces: Sequence[MicroBatch],
    limit: int | None,
    held: float,
    costs: Costs,
    slack: float,
) -> None:
    """Choose by what a profile has measured. Every rank must call this, between two steps.

    Args:
        agreed: what is chosen for.
        pieces: the micro-batches of a step.
        limit: of the memory of this rank, in bytes; None for that of its device.
        held: bytes besides slots; see `measured_bytes`.
        costs: of the operators that there are.
        slack: bytes that a searched plan of a pair of layers may take above the sequential one.

    Raises:
        ValueError: nothing fits; on all ranks.
    """
    _take(
        agreed,
        partial(
            fit,
            agreed.engine.layers,
            _kept(agreed),
            costs,
            micro_batches=len(pieces),
            tokens=tokens_of(agreed, pieces),
            room=_room(agreed, limit, held, KNOWN_SHARE),
            builder=None,
            slack=slack,
        ),
    )


def measured_bytes(agreed: AgreedEngine, states: int) -> float:
    """Bytes that this rank has taken so far besides slots; for a call between steps.

    On a GPU those that it holds, and what kernels take besides slots; on a CPU its `states`: bytes
    of weights, gradients and the optimizer.
    """
    device = agreed.context.device
    if device.type != "cuda":
        return states
    held = float(torch.cuda.memory_allocated(device))
    slots = agreed.engine.lanes.ledger.peak_bytes
    return held + max(0.0, torch.cuda.max_memory_allocated(device) - held - slots)


def tokens_of(agreed: AgreedEngine, pieces: Sequence[MicroBatch]) -> int:
    """Tokens of a micro-batch: the most of all ranks."""
    most = torch.tensor([max(float(piece.tokens) for piece in pieces)], dtype=torch.float64)
    return int(largest(most, agreed.context.world_group))


def _kept(agreed: AgreedEngine) -> Lowered:
    """The layers as if they made nothing again, and had all on the device."""
    kept = agreed.lowered("none", None)
    return replace(kept, layers=tuple(agreed.suited(kept.layers)))


def _room(agreed: AgreedEngine, limit: int | None, held: float, share: float) -> float:
    """Bytes that activations may take: on the rank of this stage that has least."""
    limit = limit_of(agreed.context.device, limit)
    room = torch.inf if limit is None else limit * share - held
    least = largest(torch.tensor([-room], dtype=torch.float64), agreed.context.stage_group)
    return -float(least)


def _take(agreed: AgreedEngine, choose: Callable[[], Fitted]) -> None:
    """Choose, install it on all ranks, and say why."""
    world = agreed.context.world_group
    known: list[Fitted] = of_all_ranks(together(choose, world), world)
    every = {key: value for other in known for key, value in other.choices.items()}
    away = {key: value for other in known for key, value in other.offloads.items()}
    agreed.use_recompute(dict(sorted(every.items())), dict(sorted(away.items())))
    tightest = min(known, key=lambda one: one.room - one.chosen.kept_bytes)
    found = tightest.chosen
    count = sum(value != "none" for value in every.values())
    copied = f", and {len(away)} have some on the host" if agreed.offloads else ""
    rank_zero_info(
        f"recompute: activations need {_size(found.kept_bytes)} and may take"
        f" {_size(tightest.room)}, so {count} of {len(every)} layers make some again{copied}:"
        f" {_size(found.peak_bytes)}, and {found.seconds / found.kept - 1:.1%} more time"
    )


def _size(size: float) -> str:
    if size == torch.inf:
        return "all that they need"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
