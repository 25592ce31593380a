"""Chooses what the layers of a stage make again or have on the host, to fit at the least time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.pipeline.stage import Leg
from lightning_dhellam.plan import Builder, GraphPair
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.model.halves import with_halves
from lightning_dhellam.search.recompute.candidates import Candidate
from lightning_dhellam.search.recompute.covering import Copies, covering
from lightning_dhellam.search.recompute.fit import Fit, Row
from lightning_dhellam.search.recompute.moments import Moment, moments
from lightning_dhellam.search.recompute.playing import played
from lightning_dhellam.search.recompute.tables import Kind, Meeting, meeting

_TRIES = 4
"""Limits, each lower than the one before, for which copies are chosen."""
_FASTER = 0.002
"""Share of a step's time by which it must be faster with copies than without."""

Key = tuple[int | None, int | None, Part]
"""Kinds of layers that meet, and the part of backward."""


@dataclass(frozen=True)
class Chosen:
    """What each layer of a stage makes again, and what of it waits on the host.

    Attributes:
        slots: of each layer that are made again.
        away: of each layer that wait in host memory.
        peak_bytes: that slots take at once.
        seconds: of a step of the stage, its layers one after the other.
        kept: the same, of a step that makes nothing again and has all on the device.
        kept_bytes: that slots would take then.
    """

    slots: tuple[frozenset[str], ...]
    away: tuple[frozenset[str], ...]
    peak_bytes: float
    seconds: float
    kept: float
    kept_bytes: float


def choose(
    measured: Sequence[GraphPair],
    kept: Sequence[GraphPair],
    legs: Sequence[Leg],
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
    again costs is what of it the other strand does not hide, and so it is of copies to the host and
    back. Those are chosen among where some were measured, and taken where a step that is played
    with them fits, and is faster than one without: pairs are played as if each followed itself, and
    do not tell what copies of other layers are under way.

    Args:
        measured: layers of a stage, of which the costs are.
        kept: the same ones, which make nothing again.
        legs: walks of the stage in a step.
        costs: what operators cost.
        limit: bytes that slots may take at once.
        tokens: how many tokens a micro-batch has.
        free: for each layer whether it may make something again; all may if not given.
        builder: makes the plans; None to search them.
        slack: bytes that a searched plan of a pair of layers may take above the sequential one.

    Raises:
        ValueError: nothing fits; it says how many bytes the least needs.
    """
    copies = Copies.of(costs, measured)
    numbers: dict[object, int] = {}
    kinds: list[Kind] = []
    of_layer: list[int] = []
    for own, pair, may in zip(measured, kept, free or [True] * len(kept), strict=True):
        key = pair.forward.fingerprint, pair.backward.fingerprint, may
        if key not in numbers:
            numbers[key] = len(kinds)
            kinds.append(Kind.of(own, pair, costs, copies, free=may))
        of_layer.append(numbers[key])
    costs = _covered(costs, kinds)
    kinds = [kind.narrowed(costs, tokens, builder, slack) for kind in kinds]
    met = moments(legs, len(kept))
    tables = _tables(kinds, of_layer, met, costs, tokens, builder, slack)

    def fitted(kinds: Sequence[Kind], tables: Mapping[Key, Meeting], room: float) -> Fitting:
        fit = _fit(kinds, of_layer, met, tables, room, tokens)
        return Fitting(fit, fit.run(), [kinds[k] for k in of_layer])

    play = partial(
        played, legs=legs, costs=costs, tokens=tokens, builder=builder, slack=slack, made={}
    )

    plain = fitted(*_staying(kinds, tables), limit)
    best = plain
    if copies is not None:
        best = _with_copies(plain, partial(fitted, kinds, tables), play, limit) or plain
    if not best.chosen:
        least = best.fit.peak(best.fit.least())
        raise ValueError(
            f"recompute='auto' finds nothing that fits: activations need {least / 2**20:,.1f} MiB"
            " at the least, and what weights, gradients and optimizer leave of the memory is"
            f" {max(limit, 0) / 2**20:,.1f} MiB: raise memory_limit, or make micro_batch_size or"
            " the sequences smaller"
        )
    return best.result()


@dataclass(frozen=True)
class Fitting:
    """What was found to fit, if anything does.

    Attributes:
        fit: that has looked for it.
        chosen: a candidate of each layer; nothing where nothing fits.
        kinds: of each layer.
    """

    fit: Fit
    chosen: tuple[int, ...]
    kinds: Sequence[Kind]

    @property
    def pairs(self) -> list[GraphPair]:
        """The layers with what was chosen."""
        return [kind.pairs[one] for kind, one in zip(self.kinds, self.chosen, strict=True)]

    @property
    def candidates(self) -> list[Candidate]:
        """What was chosen."""
        return [kind.candidates[one] for kind, one in zip(self.kinds, self.chosen, strict=True)]

    def result(self) -> Chosen:
        """The same with what it takes, against what nothing takes."""
        nothing = (0,) * len(self.chosen)
        return Chosen(
            tuple(one.slots for one in self.candidates),
            tuple(one.away for one in self.candidates),
            self.fit.peak(self.chosen),
            self.fit.time(self.chosen),
            self.fit.time(nothing),
            self.fit.peak(nothing),
        )


def _with_copies(
    plain: Fitting,
    fitted: Callable[[float], Fitting],
    play: Callable[[Sequence[GraphPair]], tuple[float, float]],
    limit: float,
) -> Fitting | None:
    """Return what fits with copies, if a step of it is faster than one without any."""
    room = limit
    for _ in range(_TRIES):
        found = fitted(room)
        if not found.chosen or not any(one.away for one in found.candidates):
            return None
        seconds, peak = play(found.pairs)
        if peak <= limit:
            faster = not plain.chosen or seconds < play(plain.pairs)[0] * (1 - _FASTER)
            return found if faster else None
        room -= peak - limit
    return None


def _staying(
    kinds: Sequence[Kind], tables: Mapping[Key, Meeting]
) -> tuple[list[Kind], dict[Key, Meeting]]:
    """Return kinds and tables without the candidates that copy anything."""
    stays = [[n for n, one in enumerate(kind.candidates) if not one.away] for kind in kinds]
    only = [
        replace(
            kind,
            candidates=tuple(kind.candidates[n] for n in own),
            pairs=tuple(kind.pairs[n] for n in own),
        )
        for kind, own in zip(kinds, stays, strict=True)
    ]

    def of(kind: int | None) -> list[int]:
        return [0] if kind is None else stays[kind]

    found = {}
    for key, table in tables.items():
        ahead, behind = of(key[0]), of(key[1])
        pays = ahead if key[1] is None else behind
        found[key] = Meeting(
            tuple(table.seconds[n] for n in pays),
            tuple(tuple(table.bytes[a][b] for b in behind) for a in ahead),
        )
    return only, found


def _key(moment: Moment, of_layer: Sequence[int]) -> Key:
    ahead, behind = moment.ahead, moment.behind
    return (
        None if ahead is None else of_layer[ahead],
        None if behind is None else of_layer[behind],
        moment.part,
    )


def _covered(costs: Costs, kinds: Sequence[Kind]) -> Costs:
    """Return the costs with those of all candidates, and of the halves of their backwards."""
    costs = covering(costs, ((kind.measured, pair) for kind in kinds for pair in kind.pairs))
    return with_halves(costs, [pair for kind in kinds for pair in kind.pairs])


def _tables(
    kinds: Sequence[Kind],
    of_layer: Sequence[int],
    moments: Mapping[Moment, int],
    costs: Costs,
    tokens: int,
    builder: Builder | None,
    slack: float,
) -> dict[Key, Meeting]:
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
        pays = moment.ahead if moment.behind is None else moment.behind
        assert pays is not None, "a moment of no layer"
        seconds[pays] = seconds[pays] + np.array(table.seconds) * times
        ahead, _, part = _key(moment, of_layer)
        partner = ahead, moment.behind is None, part
        met = meets[pays]
        met[partner] = met.get(partner, 0) + times
    groups: dict[object, int] = {}
    alike = [
        groups.setdefault((k, frozenset(met.items())), len(groups))
        for k, met in zip(of_layer, meets, strict=True)
    ]
    return Fit(seconds, sizes, left, alike, rows, limit)
