"""What backward makes again in a cell: what was asked for, or what fits into a share of memory.

Where it is to fit, what layers make again is chosen as `recompute="auto"` does with a search, by
measured times; Megatron's order is given the first of `selective` and `full` that fits as well,
which is the faster where both do, since `full` makes again all that `selective` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_dhellam.bench.overlap.cells import Cell
from lightning_dhellam.bench.workload import Workload, emulated
from lightning_dhellam.layers import lower
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair
from lightning_dhellam.plan.by_layer import AUTO, ByLayer
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.recompute import choose
from lightning_dhellam.search.recompute.covering import covering

Making = Callable[[Recompute | ByLayer], Workload]
"""Makes the workload of a cell, whose backward makes so much again."""


@dataclass(frozen=True)
class Again:
    """What backward makes again under each plan.

    Attributes:
        own: under all plans but Megatron's.
        megatron: under Megatron's.
        costs: of the operators of both, if they were measured to choose.
        needed: most bytes of slots in a step that keeps all; None where the choice was given.
        limit: what of that slots may take; None likewise.
        note: what was chosen, and why; nothing where it was given.
    """

    own: Recompute | ByLayer
    megatron: Recompute | ByLayer
    costs: Costs | None = None
    needed: float | None = None
    limit: float | None = None
    note: str = ""

    def works(self, make: Making, plans: Sequence[str]) -> dict[str, Workload]:
        """The workload of each plan: one for all that make the same again."""
        own = make(self.own)
        other = own if self.megatron == self.own else make(self.megatron)
        return {name: other if name == "megatron" else own for name in plans}

    def said(self, plan: str) -> str:
        """What backward makes again under a plan, in a word."""
        what = self.megatron if plan == "megatron" else self.own
        return what if isinstance(what, str) else AUTO


def fitted(make: Making, share: float, repeats: int, slack: float) -> Again:
    """Choose what fits into a share of the activation memory that a step needs which keeps all.

    Args:
        make: makes the workload.
        share: of the activation memory.
        repeats: runs of each operator that count, in the profile.
        slack: share of the limit that a searched plan may take above the sequential one.

    Raises:
        ValueError: nothing fits.
    """
    kept, whole = make("none"), make("full")
    needed = slot_peak(kept, BUILDERS["sequential"])
    limit = share * needed
    costs = Costs.of(whole.profile(repeats=repeats))
    count = len(kept.layers)
    legs = kept.engine().stage.step(len(kept.pieces)).legs
    found = choose(
        whole.layers,
        kept.layers,
        legs,
        costs,
        limit=limit,
        tokens=kept.tokens,
        free=[0 < number < count - 1 for number in range(count)],
        slack=slack * limit,
    )
    own: dict[str | int, Recompute] = {
        str(i): sorted(slots) or "none" for i, slots in enumerate(found.slots[1:-1])
    }
    choices: list[Recompute | ByLayer] = ["none", "selective", "full"]
    peaks = {str(one): slot_peak(make(one), BUILDERS["megatron"]) for one in choices}
    fits = (one for one in choices if peaks[str(one)] <= limit)
    megatron = next(fits, choices[-1])
    others = [make(own).layers, make(megatron).layers]
    every = [pair for layers in others for pair in zip(whole.layers, layers, strict=True)]
    again = sum(one != "none" for one in own.values())
    note = (
        f"activations need {needed / 2**20:,.1f} MiB and may take {limit / 2**20:,.1f}:"
        f" {again} of {len(own)} layers make some again, and Megatron's order has '{megatron}'"
        f" ({peaks[str(megatron)] / 2**20:,.1f} MiB)"
    )
    return Again(own, megatron, covering(costs, every), needed, limit, note)


def slot_peak(work: Workload, builder: Builder) -> int:
    """The most bytes of slots in the longest step under the plans of `builder`."""
    ledger = work.lanes.ledger
    ledger.peak_bytes = ledger.bytes
    work.engine(builder).train(work.pieces)
    return ledger.peak_bytes


def saved_of(layers: Sequence[GraphPair], tokens: int) -> float:
    """Bytes of activations that a layer saves of a micro-batch, in the mean."""
    return sum(pair.saved_bytes(tokens) for pair in layers) / len(layers)


def saved_by_none(work: Workload, cell: Cell, length: int) -> float:
    """What the layers of a cell would save in the mean, if they made nothing again."""
    lowered = lower(
        work.model,
        recompute="none",
        context_exchange=cell.exchange,
        kernels=emulated(cell.fp8, work.model.context.device),
        **cell.eight_bits,
    )
    inner = [pair.at(length) for pair in lowered.layers[1 : cell.layers + 1]]
    return saved_of(inner, work.tokens)
