"""A pure function from graphs to graphs: saved slots wait for backward in host memory.

    forward   gemm -> gate_up    swiglu: gate_up    gate_up.offload: gate_up -> gate_up_on_host
    backward  gate_up.fetch: gate_up_on_host -> gate_up_back    swiglu.grad: gate_up_back ...

Both copies are operators, each on a lane of its own, which a plan orders as all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from lightning_dhellam.nearest import suggestion
from lightning_dhellam.plan import nominal
from lightning_dhellam.plan.by_layer import AUTO
from lightning_dhellam.plan.graph import GraphPair, called
from lightning_dhellam.plan.operator import Lane, Operator
from lightning_dhellam.plan.passes import renamed

ALL = "all"
"""In place of slots: all that is saved."""

Slots = str | Collection[str] | None
"""What of a layer waits in host memory: `ALL`, or names of slots; nothing with None."""

Offload = Slots | Mapping[str, Slots]
"""The same of all layers, or by the keys that `layers.Lowered` has; nothing of those left out."""


def of_layer(what: Offload, key: str) -> Slots:
    """What a choice says of the layer of a key."""
    return what.get(key) if isinstance(what, Mapping) else what


def movable(pair: GraphPair, what: Slots) -> tuple[str, ...]:
    """The saved slots that a choice names and that can wait in host memory."""
    recorded = _recorded(pair)
    makers = pair.forward.producers
    return tuple(
        slot
        for slot in pair.saved
        if what is not None
        and (what == ALL or slot in what)
        and slot not in recorded
        and not (slot in makers and makers[slot].lane is Lane.HOST)
    )


def offload(
    pair: GraphPair, what: Slots, away: Callable[[Any], Any], back: Callable[[Any], Any]
) -> GraphPair:
    """The same layer, of which such slots as are saved are on the host until backward reads them.

    What the host has asked for is there already, and stays as it is. So does a graph of autograd,
    which cannot be moved, and what it holds memory of.

    Args:
        pair: with what its backward makes again.
        what: to offload; what is not saved is not moved.
        away: takes the value of a slot, and returns what stands for it on the host.
        back: takes that, and returns the value.
    """
    moved, sizes = movable(pair, what), pair.forward.bytes_per_token
    if not moved:
        return pair
    # A layer forward beside one backward: as long as copies take no longer than that in the mean,
    # compute never waits for one, however bunched they are, and no more is held than need be.
    within = sum(o.computes for graph in (pair.forward, pair.backward) for o in graph.operators)
    ahead = list(pair.forward.operators)
    behind = [renamed(o, {s: f"{s}_back" for s in moved}) for o in pair.backward.operators]
    for slot in moved:
        cost = sizes.get(slot, 0.0) / nominal.HOST_LINK
        host = f"{slot}_on_host"
        last = max((n for n, o in enumerate(ahead) if slot in (*o.reads, *o.writes)), default=-1)
        leaves = Operator(f"{slot}.offload", Lane.OFFLOAD, (slot,), (host,), away, cost)
        ahead.insert(last + 1, replace(leaves, ahead=within))
        first = next(n for n, o in enumerate(behind) if f"{slot}_back" in o.reads)
        # An operator ahead of the one that reads it, so that it comes under that.
        comes = Operator(f"{slot}.fetch", Lane.FETCH, (host,), (f"{slot}_back",), back, cost)
        behind.insert(max(first - 1, 0), replace(comes, ahead=within))
    name = called(pair.name, "offload")
    return GraphPair(
        replace(
            pair.forward,
            name=name,
            operators=tuple(ahead),
            bytes_per_token={**sizes, **{f"{slot}_on_host": 0.0 for slot in moved}},
        ),
        replace(
            pair.backward,
            name=name,
            operators=tuple(behind),
            bytes_per_token={
                **pair.backward.bytes_per_token,
                **{f"{slot}_back": sizes.get(slot, 0.0) for slot in moved},
            },
        ),
    )


def _recorded(pair: GraphPair) -> set[str]:
    """The slots whose memory is held by graphs of autograd that are saved."""
    return {
        slot
        for operator in pair.forward.operators
        if not set(operator.records).isdisjoint(pair.saved)
        for slot in (*operator.reads, *operator.writes)
    }


def check_offload(what: Offload, slots: Collection[str], keys: Collection[str] = ()) -> None:
    """Refuse what is none of the slots that layers have, or of none of the layers.

    Args:
        what: to offload.
        slots: of all layers.
        keys: of all layers, for what is given by layer.

    Raises:
        ValueError: with the nearest name.
    """
    by_layer = what if isinstance(what, Mapping) else {}
    for key in by_layer:
        if key not in keys:
            raise ValueError(
                f"offload has slots of layer '{key}', which the model has not: its layers are"
                f" {', '.join(filter(None, keys))}" + suggestion(key, keys)
            )
    each = by_layer.values() if isinstance(what, Mapping) else (what,)
    for name in (n for one in each if one is not None and one != ALL for n in one):
        if name not in slots:
            raise ValueError(
                f"offload names {name!r}, which no layer has: use '{ALL}', or a list with some of"
                f" {', '.join(sorted(slots))}" + suggestion(name, slots)
            )


def check_choice(what: Offload, recompute: object) -> None:
    """Refuse what is no choice, or goes with no other.

    Raises:
        ValueError: with the value, the rule and the remedy.
    """
    if isinstance(what, Mapping):
        raise ValueError(
            f"offload={what!r} is by layer, which only '{AUTO}' chooses: use '{ALL}', '{AUTO}' or a"
            " list of slots"
        )
    if isinstance(what, str) and what not in (ALL, AUTO):
        raise ValueError(
            f"offload={what!r} must be '{ALL}', '{AUTO}' or a list of slots, such as [{what}]"
        )
    if what == AUTO and recompute != AUTO:
        raise ValueError(
            f"offload='{AUTO}' is chosen together with what is made again: say recompute='{AUTO}'"
            f" as well, or offload='{ALL}' or a list of slots"
        )
    if what is not None and what != AUTO and recompute == AUTO:
        raise ValueError(
            f"recompute='{AUTO}' chooses among what stays on the device: leave offload out, let"
            f" offload='{AUTO}' be chosen as well, or say what is made again, such as"
            " recompute='selective'"
        )
