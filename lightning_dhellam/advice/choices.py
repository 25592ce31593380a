"""All the ways in which a model can be spread over a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lightning_dhellam.engine.inputs import check_length
from lightning_dhellam.layers.fp8_formats import check_shapes
from lightning_dhellam.memory import Run
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import Topology
from lightning_dhellam.pipeline.schedules import (
    AUTO,
    SCHEDULES,
    ScheduleError,
    placement_of,
    scheme_of,
)

RECOMPUTES = ("none", "gathers", "selective", "full")
"""What layers may make again, from the least time to the least memory."""
_LARGEST = 8
"""Samples of a micro-batch, at most: larger ones compute no faster."""
_SHORTEST = 1024
"""Tokens of a sequence on each rank that shares it, at least: fewer would only wait."""

_STANDS_IN = "fold"
"""Is played in place of a schedule that is searched, which is searched for the best only."""


@dataclass(frozen=True)
class Question:
    """What advice is asked for.

    Attributes:
        config: of the model.
        ranks: that there are.
        node: devices of a node, inside of which tensor-parallel ranks lie.
        global_batch: samples of a step, of all ranks together.
        length: tokens of a sequence.
        precision: of the run.
        schedules: to choose from; all that are trained, and `auto`, if not given.
        recomputes: to choose from.
        fp8: how linear layers may compute, of `fp8_formats.FORMATS`; None for not in 8 bits.
    """

    config: ModelConfig
    ranks: int
    node: int
    global_batch: int
    length: int
    precision: str = "bf16-mixed"
    schedules: tuple[str, ...] = ()
    recomputes: Sequence[str] = RECOMPUTES
    fp8: Sequence[str | None] = (None,)


def topologies(question: Question, refusals: list[str] | None = None) -> Iterator[Topology]:
    """Give every way to cut the ranks into groups that the model can be cut into.

    Why it cannot be cut into others is added to `refusals`.
    """
    refusals = [] if refusals is None else refusals
    ranks = question.ranks
    for tp in _divisors(min(ranks, question.node)):
        for cp in _divisors(ranks // tp) if ranks % tp == 0 else ():
            if cp > 1 and (question.length % (2 * cp * tp) or question.length < _SHORTEST * cp):
                continue
            for pp in _divisors(ranks // tp // cp):
                yield from _with_experts(question, tp, cp, pp, refusals)


def _with_experts(
    question: Question, tp: int, cp: int, pp: int, refusals: list[str]
) -> Iterator[Topology]:
    config = question.config
    experts = _divisors(config.num_experts) if config.num_experts else [1]
    for ep in experts:
        for etp in {1, tp} if config.num_experts else {tp}:
            try:
                found = Topology(question.ranks, 0, tp, pp, cp, ep, etp)
                run_of(question, found, question.global_batch, 1, "fold", "none").check()
                check_length(question.length, config.max_sequence_length, tp, cp)
            except ValueError as error:  # the model cannot be cut like this
                refusals.append(str(error))
                continue
            yield found


def runs(question: Question, refused: Counter[str]) -> Iterator[Run]:
    """Give every run; of what is none it is counted why.

    Raises:
        ValueError: the sequences are too long for the model; or it cannot be cut in any way, with
            the last reason; or no way leaves a share of the batch to each rank, with the nearest
            batches that could be shared out.
    """
    check_length(question.length, question.config.max_sequence_length, 1)
    refusals: list[str] = []
    found = [*topologies(question, refusals)]
    if not found:
        raise ValueError(
            f"there is no way to cut {question.ranks} ranks that suits the model: {refusals[-1]}"
        )
    batch = question.global_batch
    if all(batch % topology.dp_size for topology in found):
        least = min(topology.dp_size for topology in found)
        near = max(least, batch - batch % least)
        raise ValueError(
            f"--global-batch {batch} cannot be shared out: at least {least} ranks of"
            f" {question.ranks} train on samples of their own; use {near} or {near + least}"
        )
    for topology in found:
        if batch % topology.dp_size:
            refused["have another share of the batch on some ranks"] += 1
            continue
        samples = batch // topology.dp_size
        # Alone a rank gathers nothing, and so has nothing gathered to keep.
        remade = [one for one in question.recomputes if one != "none" or topology.tp_size > 1]
        formats = [*_formats(question, topology, refused)]
        for size in (n for n in _divisors(samples) if n <= _LARGEST):
            for schedule in _schedules(question, topology.pp_size, samples // size, refused):
                for one, fp8 in product(remade, formats):
                    yield run_of(question, topology, samples, size, schedule, one, fp8)


def run_of(
    question: Question,
    topology: Topology,
    samples: int,
    size: int,
    schedule: str,
    recompute: str,
    fp8: str | None = None,
) -> Run:
    """The run of one choice, whose plan a search finds."""
    return Run(
        question.config,
        topology,
        samples,
        question.length,
        micro_batch_size=size,
        precision=question.precision,
        plan="auto",
        recompute=recompute,
        schedule=schedule,
        fp8=fp8,
    )


def shape_of(run: Run) -> Run:
    """What the operators of a run follow from: all runs with the same one share a lowering."""
    t = run.topology
    world = t.stage_size if run.config.num_experts else t.tp_size * t.cp_size
    narrow = replace(t, world_size=world, pp_size=1)
    return replace(run, topology=narrow, samples=1, micro_batch_size=1, schedule="fold", split=None)


def _formats(question: Question, topology: Topology, refused: Counter[str]) -> Iterator[str | None]:
    for fp8 in question.fp8:
        try:
            if fp8 is not None:
                check_shapes(fp8, question.config, topology.tp_size)
        except ValueError:
            refused[f"have layers whose share is of no size for fp8={fp8!r}"] += 1
            continue
        yield fp8


def _schedules(
    question: Question, stages: int, micro_batches: int, refused: Counter[str]
) -> Iterator[str]:
    if stages == 1:
        yield "fold"
        return
    wanted = question.schedules or SCHEDULES
    for name in dict.fromkeys(_STANDS_IN if name == AUTO else name for name in wanted):
        try:
            scheme_of(name, stages)(stages, micro_batches)
        except ScheduleError:
            refused["have a schedule that is not defined for their micro-batches"] += 1
            continue
        yield name


def searching(question: Question, run: Run) -> Run | None:
    """The same run with a schedule that is searched; None where it may not, or cannot be."""
    stages = run.topology.pp_size
    allowed = not question.schedules or AUTO in question.schedules
    if stages == 1 or not allowed or run.placement != placement_of(AUTO, stages):
        return None
    return replace(run, schedule=AUTO)


def stands_in(question: Question, run: Run) -> bool:
    """Whether a run is played for that with a searched schedule, and was itself not asked for."""
    asked = question.schedules
    return run.topology.pp_size > 1 and bool(asked) and run.schedule not in (*asked, AUTO)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
