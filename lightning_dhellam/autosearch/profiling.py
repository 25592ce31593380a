"""Measures an engine's operators on the values of a real micro-batch, for the search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from lightning_dhellam.autosearch.reductions import Reduction
from lightning_dhellam.engine import Engine, MicroBatch, OperatorTimer, Subject
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import largest
from lightning_dhellam.plan import Graph
from lightning_dhellam.search.measure import (
    BenchError,
    Clock,
    Fingerprint,
    Profile,
    Progress,
    Samples,
    Target,
    measure,
    with_routings,
)

_LEAD = 20e-6
"""Seconds in which a kernel has taken the processors that it wants."""
_SUSTAINED = 1.2
"""Seconds after which a device that computes has settled on a clock: at first it takes more power
than its limit, and then less."""
_PAUSE = 0.35
"""Of a device that computes for most of the time: pauses as a share of each operator's time."""
_ROUNDS = 3
"""Of all measurements on a host, whose processors and network others may take for seconds."""
_ROUTINGS = 6
"""As many as a search looks at all the time."""
_PACKAGES = ("torch", "megatron-core", "triton", "flash-attn", "transformer-engine")


def fingerprint(
    engine: Engine,
    micro_batch: MicroBatch,
    made_for: Mapping[str, Any],
    kernels: Mapping[str, str],
) -> Fingerprint:
    """Return what a profile of `engine` on such micro-batches is valid for.

    `made_for` are the `conditions`, `kernels` the backends of the operators.
    """
    batch, length = micro_batch.slots["batch.tokens"].shape
    shapes = {**made_for["shapes"], "micro_batch_size": batch, "sequence_length": length}
    graphs = {graph.fingerprint: str(graph) for graph in _graphs(engine)}
    return Fingerprint(
        made_for["device"],
        versions(),
        made_for["sizes"],
        shapes,
        made_for["dtype"],
        graphs,
        dict(kernels),
    )


def versions() -> dict[str, str]:
    """Versions of the packages that run operators, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def take_profile(
    engine: Engine,
    micro_batch: MicroBatch,
    made_for: Fingerprint,
    *,
    group: dist.ProcessGroup | None = None,
    repeats: int = 7,
    rounds: int | None = None,
    progress: Progress | None = None,
    reduction: Reduction | None = None,
    others: Sequence[tuple[MicroBatch, int]] = (),
) -> Profile:
    """Time each kind of operator alone, and communication beside what may run with it.

    Adds to gradients, so call it between a step and the next one's clearing. Leaves nothing else.
    Every rank must.

    Args:
        engine: whose operators are timed.
        micro_batch: what they work on.
        made_for: its `fingerprint`.
        group: ranks over which times are the largest; None for this rank's own.
        repeats: runs of each measurement that count, at least.
        rounds: over which they are spread: one on a GPU, several on a host, if not given.
        progress: is told what is measured next.
        reduction: of gradients, which is timed like an operator of a layer.
        others: micro-batches and numbers of layers whose routings count as well: see
            `routings_of`.

    Raises:
        BenchError: names the operator that failed.
    """
    device = micro_batch.slots["batch.tokens"].device
    rounds = rounds or (1 if device.type == "cuda" else _ROUNDS)
    with engine.untouched(device):
        timer = OperatorTimer(engine.lanes, group, repeats=math.ceil(repeats / rounds))
        failure: torch.OutOfMemoryError | None = None
        mine = math.inf
        try:
            captured = engine.capture(micro_batch)
            graphs = [*_graphs(engine)]
            if reduction is not None:
                graphs.append(reduction.graph)
                captured |= reduction.captured()
            bench = EngineBench(timer, captured)
            mine = _launch_seconds(engine, micro_batch)
        except torch.OutOfMemoryError as error:
            failure = error
        # A rank that raised before this would leave the others waiting for it.
        launch = float(largest(torch.tensor([mine], dtype=torch.float64), group))
        if math.isinf(launch):
            where = "" if failure else " on another rank"
            raise BenchError(
                f"there is no memory{where} for the values that operators are timed on: make"
                " micro_batch_size smaller, or use a built-in plan (plan='interleaved')"
            ) from failure
        profile = measure(
            bench,
            graphs,
            made_for,
            progress=progress,
            launch=launch,
            inline=device.type == "cpu",
            rounds=rounds,
        )
        if timer.on_cuda:
            profile = replace(profile, clock=bench.clock(profile))
        # Before others are made.
        captured, bench = {}, EngineBench(timer, {})

        def again(piece: MicroBatch, number: int) -> EngineBench:
            return EngineBench(timer, engine.capture(piece, number))

        benches = [partial(again, *other) for other in others]
        return with_routings(profile, benches, rounds=rounds, progress=progress)


def routings_of(
    engine: Engine, pieces: Sequence[MicroBatch], group: dist.ProcessGroup | None
) -> list[tuple[MicroBatch, int]]:
    """Choose the routings, beside the first one, that a profile measures by.

    Different micro-batches and layers have different ones. Returns a micro-batch and the number of
    a layer, for `Engine.capture`, of each: as many on all ranks of `group`, which are all that run
    a micro-batch together; none where no operator varies.
    """
    kinds = Counter(
        pair.forward.fingerprint
        for pair in engine.layers
        if any(o.varies for o in pair.forward.operators)
    )
    own = torch.tensor([max(kinds.values(), default=0), -len(pieces)], dtype=torch.float64)
    layers, fewest = map(round, largest(own, group).tolist())
    count = min(_ROUTINGS, layers * -fewest)
    return [(pieces[n % -fewest], n // -fewest + n % -fewest) for n in range(1, count)]


class EngineBench:
    """Times an engine's operators on captured values; a `search.measure.Bench`.

    Args:
        timer: of this rank's lanes.
        captured: what each kind of operator reads; see `Engine.capture`.
    """

    def __init__(self, timer: OperatorTimer, captured: Mapping[tuple[str, str], list[Any]]) -> None:
        self._timer = timer
        self._captured = captured
        self.lead = _LEAD if timer.on_cuda else 0.0

    def shrinks(self, target: Target) -> bool:
        """Tell whether a target can leave processors to communication with the same results."""
        return self._timer.same_bits(self._subject(target))

    def clock(self, profile: Profile) -> Clock:
        """Measure the clock of a device that computes most of the time, as for the commonest layer.

        Profiled operators run on a device that idles in between, and so at its highest clock.
        """
        known = {(row.operator, row.partner): row.median for row in profile.timings if not row.lead}
        layer = [
            Target(profile.operators[graph.fingerprint][operator.name], graph, operator)
            for graph in profile.graphs[:2]
            for operator in graph.operators
        ]
        compute = [target for target in layer if target.operator.computes]
        once = sum(known[target.key, None] for target in compute)
        # Where processors carry it, communication is slowed most beside computation.
        longest = max(compute, key=lambda target: known[target.key, None])
        pairs = [target for target in layer if (target.key, longest.key) in known]
        before = sum(known[target.key, longest.key] for target in pairs)
        subjects = [self._subject(target) for target in compute]
        beside = [(self._subject(target), self._subject(longest)) for target in pairs]
        full = self._timer.sustained(subjects, _SUSTAINED, 0.0, beside)
        paused = self._timer.sustained(subjects, _SUSTAINED, _PAUSE)
        return Clock.through(
            full.seconds / once,
            (paused.share, paused.seconds / once),
            full.after / before if before else 1.0,
        )

    def alone(self, target: Target) -> Samples:
        """Time one operator while nothing else runs."""
        with self._timer.sharing(target.spare):
            return self._samples(self._timer.alone(self._subject(target)))

    def beside(self, communication: Target, other: Target) -> tuple[Samples, Samples]:
        """Start both, communication first, and time each from the start to its own end.

        `other` computes, or communicates on another lane.
        """
        subjects = self._subject(communication), self._subject(other)
        with self._timer.sharing(other.spare):
            first, second = self._timer.beside(*subjects)
        return self._samples(first), self._samples(second)

    def behind(
        self, communication: Target, compute: Target, lead: float
    ) -> tuple[Samples, Samples]:
        """Start communication `lead` after computation, and time each from its own start."""
        subjects = self._subject(communication), self._subject(compute)
        with self._timer.sharing(compute.spare):
            first, second = self._timer.behind(*subjects, lead)
        return self._samples(first), self._samples(second)

    def _samples(self, runs: Sequence[float]) -> Samples:
        """Samples of one round; on a host a single one, the mean.

        A step is a sum: what delays some runs of an operator on a host does so in a step as well,
        and a median would not see it.
        """
        return Samples(tuple(runs) if self._timer.on_cuda else (fmean(runs),))

    def _subject(self, target: Target) -> Subject:
        values = self._captured[target.graph.fingerprint, target.operator.name]
        return Subject(target.operator, values)


def _graphs(engine: Engine) -> Sequence[Graph]:
    """Return one graph of each kind, those of the most frequent layers first."""
    counts: dict[str, int] = {}
    kinds: dict[str, Graph] = {}
    for pair in engine.layers:
        for graph in (pair.forward, pair.backward):
            kinds.setdefault(graph.fingerprint, graph)
            counts[graph.fingerprint] = counts.get(graph.fingerprint, 0) + 1
    return sorted(kinds.values(), key=lambda graph: -counts[graph.fingerprint])


def _launch_seconds(engine: Engine, micro_batch: MicroBatch) -> float:
    """Return the seconds the host needs to issue an operator; 0 on CPU, where they run inline."""
    device = micro_batch.slots["batch.tokens"].device
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    return min(engine.issue_seconds(micro_batch) for _ in range(3))


def of_stage(path: Path | None, context: ParallelContext) -> Path | None:
    """Stages have other operators, and so each its own file."""
    if path is None or context.topology.pp_size == 1:
        return path
    return path.with_stem(f"{path.stem}-stage{context.topology.pp_rank}")
