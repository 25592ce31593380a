"""Chooses what the layers of a stage make again, so that it fits at the least time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.plan import Builder, GraphPair
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.model.halves import with_halves
from lightning_dhellam.search.recompute.covering import covering
from lightning_dhellam.search.recompute.fit import Fit, Row
from lightning_dhellam.search.recompute.moments import Moment
from lightning_dhellam.search.recompute.tables import Kind, Meeting, meeting


@dataclass(frozen=True)
class Chosen:
    """What each layer of a stage makes again.

    Attributes:
        slots: of each layer.
        peak_bytes: that slots take at once.
        seconds: of a step of the stage, its layers one after the other.
        kept: the same, of a step that makes nothing again.
        kept_bytes: that slots would take then.
    """

    slots: tuple[frozenset[str], ...]
    peak_bytes: float
    seconds: float
    kept: float
    kept_bytes: float


def choose(
    measured: Sequence[GraphPair],
    kept: Sequence[GraphPair],
    moments: Mapping[Moment, int],
    costs: Costs,
    *,
    limit: float,
    tokens: int,
    free: Sequence[bool] | None = None,
    builder: Builder | None = None,
    slack: float = 0.0,
) -> Chosen:
    """Choose what backward makes again in each layer, at the least time of which all fits.

    A layer's candidates are played beside those that it meets, by a plan each: what making slots
    again costs is what of it the other strand does not hide.

    Args:
        measured: layers of a stage, of which the costs are.
        kept: the same ones, which make nothing again.
        moments: how often two of them meet in a step, and what is saved then.
        costs: what operators cost.
        limit: bytes that slots may take at once.
        tokens: how many tokens a micro-batch has.
        free: for each layer whether it may make something again; all may if not given.
        builder: makes the plans; None to search them.
        slack: bytes that a searched plan of a pair of layers may take above the sequential one.

    Raises:
        ValueError: nothing fits; it says how many bytes the least needs.
    """
    numbers: dict[object, int] = {}
    kinds: list[Kind] = []
    of_layer: list[int] = []
    for own, pair, may in zip(measured, kept, free or [True] * len(kept), strict=True):
        key = pair.forward.fingerprint, pair.backward.fingerprint, may
        if key not in numbers:
            numbers[key] = len(kinds)
            kinds.append(Kind.of(own, pair, costs, free=may))
        of_layer.append(numbers[key])
    tables = _tables(kinds, of_layer, moments, costs, tokens, builder, slack)
    fit = _fit(kinds, of_layer, moments, tables, limit, tokens)
    chosen = fit.run()
    if not chosen:
        raise ValueError(
            f"recompute='auto' finds nothing that fits: activations need"
            f" {fit.peak(fit.least()) / 2**20:,.1f} MiB at the least, and what weights, gradients"
            f" and optimizer leave of the memory is {max(limit, 0) / 2**20:,.1f} MiB: raise"
            " memory_limit, or make micro_batch_size or the sequences smaller"
        )
    nothing = (0,) * len(kept)
    return Chosen(
        tuple(kinds[k].candidates[one].slots for k, one in zip(of_layer, chosen, strict=True)),
        fit.peak(chosen),
        fit.time(chosen),
        fit.time(nothing),
        fit.peak(nothing),
    )


Key = tuple[int | None, int | None, Part]
"""Kinds of layers that meet, and the part of backward."""


def _key(moment: Moment, of_layer: Sequence[int]) -> Key:
    ahead, behind = moment.ahead, moment.behind
    return (
        None if ahead is None else of_layer[ahead],
        None if behind is None else of_layer[behind],
        moment.part,
    )


def _tables(
    kinds: Sequence[Kind],
    of_layer: Sequence[int],
    moments: Mapping[Moment, int],
    costs: Costs,
    tokens: int,
    builder: Builder | None,
    slack: float,
) -> dict[Key, Meeting]:
    costs = covering(costs, ((kind.measured, pair) for kind in kinds for pair in kind.pairs))
    costs = with_halves(costs, [pair for kind in kinds for pair in kind.pairs])
    found: dict[Key, Meeting] = {}
    for moment in moments:
        ahead, behind, part = key = _key(moment, of_layer)
        if key not in found:
            first = None if ahead is None else kinds[ahead]
            second = None if behind is None else kinds[behind]
            found[key] = meeting(first, second, part, costs, tokens, builder, slack)
    return found


def _fit(
    kinds: Sequence[Kind],
    of_layer: Sequence[int],
    moments: Mapping[Moment, int],
    tables: Mapping[Key, Meeting],
    limit: float,
    tokens: int,
) -> Fit:
    seconds = [np.zeros(len(kinds[k].candidates)) for k in of_layer]
    sizes = [np.array([one.saved * tokens for one in kinds[k].candidates]) for k in of_layer]
    left = [np.array(kinds[k].left) * tokens for k in of_layer]
    rows = []
    meets: list[dict[object, int]] = [{} for _ in of_layer]
    for moment, times in moments.items():
        table = tables[_key(moment, of_layer)]
        size = np.array(table.bytes)
        rows.append(Row(moment.saved, moment.left, moment.ahead, moment.behind, size))
        if moment.behind is not None:
            seconds[moment.behind] = seconds[moment.behind] + np.array(table.seconds) * times
            ahead, _, part = _key(moment, of_layer)
            partner = ahead, part
            met = meets[moment.behind]
            met[partner] = met.get(partner, 0) + times
    groups: dict[object, int] = {}
    alike = [
        groups.setdefault((k, frozenset(met.items())), len(groups))
        for k, met in zip(of_layer, meets, strict=True)
    ]
    return Fit(seconds, sizes, left, alike, rows, limit)
