"""A step of a run on a cluster: a pure function of the run, the cluster and a profile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_dhellam.advice.memory import memory_of
from lightning_dhellam.advice.narrower import offers
from lightning_dhellam.advice.plans import SEARCHED_PLAN, solution_of
from lightning_dhellam.advice.priceable import Conditions, Priceable
from lightning_dhellam.advice.schedules import settled
from lightning_dhellam.layers import fp8_formats
from lightning_dhellam.memory import RankMemory, Run
from lightning_dhellam.models import training_flops_per_token
from lightning_dhellam.parallel.topology import LANES
from lightning_dhellam.pipeline.schedules import AUTO as SEARCHES
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair, Lane
from lightning_dhellam.plan.by_layer import AUTO
from lightning_dhellam.plan.file import named_plan
from lightning_dhellam.plan.offloading import Offload
from lightning_dhellam.search.cluster import (
    Choice,
    LaneUse,
    Origin,
    Played,
    Prediction,
    StagePrediction,
    VisitSpan,
    middle,
)
from lightning_dhellam.search.solve import Budget

UNSURE = 0.035
"""How far real steps on two H200 were from predicted ones, either way, of which the operators were
measured: benchmarks/multi_gpu, 2026-11-25."""


def predict(
    run: Run,
    conditions: Conditions,
    *,
    memory: tuple[RankMemory, ...] = (),
    builders: Mapping[str, Builder] | None = None,
    sketch: bool = False,
    search: Budget | None = None,
) -> Prediction:
    """Predict a step.

    Args:
        run: whose step it is.
        conditions: cluster and profile.
        memory: of each stage, where it was predicted; it is for a schedule that is to be searched
            within what a device has.
        builders: orders to choose from; by default the run's plan. `auto` is taken for the fastest
            of the built-in plans, which a search is never behind. A schedule that is to be searched
            is: among those with a name, and one without.
        sketch: whether to play few layers of many that are alike.
        search: how long a plan is searched where the run's is `auto`; None to search none.

    Raises:
        ValueError: it is not predicted, see `check_run`, or the run has no step.
    """
    priceable = Priceable.of(run, conditions, conditions.known())
    orders = builders or builders_of(run.plan)
    if search is not None and run.plan == SEARCHED_PLAN:
        orders = {**orders, SEARCHED_PLAN: solution_of(priceable, search).builder()}
    if run.schedule == SEARCHES and run.topology.pp_size > 1:
        priceable, memory = settled(priceable, orders, memory or memory_of(run))
    found = prediction_of(priceable, orders, memory=memory, sketch=sketch)
    if sketch:
        return found
    return replace(found, notes=(*found.notes, *map(str, offers(run, conditions, found))))


def builders_of(plan: str) -> Mapping[str, Builder]:
    """The orders that a plan may have: of `auto` all that are built in."""
    return BUILDERS if plan == "auto" else {plan: named_plan(plan)}


def prediction_of(
    priceable: Priceable,
    builders: Mapping[str, Builder],
    *,
    memory: tuple[RankMemory, ...] = (),
    sketch: bool = False,
) -> Prediction:
    """Play a run's step, and say all there is to say of it."""
    run, work, conditions = priceable.run, priceable.work, priceable.conditions
    priced, known = priceable.priced, conditions.profile
    step = priceable.play(builders, sketch=sketch)
    seconds = step.seconds
    rough = step if sketch else priceable.play(builders, sketch=True)
    low, high = (
        seconds * priceable.play(builders, wrong, sketch=True).seconds / rough.seconds
        for wrong in (-1, 1)
    )
    topology = run.topology
    tokens = run.samples * topology.dp_size * run.length
    flops = training_flops_per_token(run.config, run.length) * tokens
    commonest = _commonest(work.layers)
    shown = middle(commonest, builders[step.usual], priced.costs)
    device = conditions.device
    return Prediction(
        conditions.model,
        conditions.cluster.name,
        device.name,
        known.fingerprint.device if known is not None else "",
        choice_of(run),
        run.length,
        seconds,
        low * (1 - UNSURE),
        high * (1 + UNSURE),
        tokens / seconds,
        flops / seconds / (priceable.machine.flops() * topology.world_size),
        _lanes(priceable, step, shown.exposed),
        _stages(step, topology.stage_size, memory),
        int(device.memory),
        shown.intervals,
        {shown.name: shown.plan},
        _origins(priceable),
        _notes(priceable, step, builders),
        step.plan,
    )


def choice_of(run: Run) -> Choice:
    """How a run is spread."""
    t = run.topology
    recompute = run.recompute if isinstance(run.recompute, str) else "by layer"
    return Choice(
        t.tp_size,
        t.cp_size,
        t.ep_size,
        t.etp_size,
        t.pp_size,
        t.dp_size,
        run.micro_batch_size,
        run.samples // run.micro_batch_size,
        run.schedule or run.begun,
        recompute,
        run.plan,
        run.fp8 or "",
        _named(run.offload),
    )


def _named(offload: Offload) -> str:
    if offload is None or isinstance(offload, str):
        return offload or ""
    return " and ".join(offload)


def _commonest(layers: Sequence[GraphPair]) -> GraphPair:
    inner = layers[1:-1]
    names = Counter(pair.backward.fingerprint for pair in inner)
    return max(inner, key=lambda pair: names[pair.backward.fingerprint])


def _busy(priceable: Priceable, layers: list[int]) -> dict[Lane, float]:
    """Seconds that the operators of some layers take, on each lane, in a step."""
    found: dict[Lane, float] = {}
    work, costs = priceable.work, priceable.priced.costs
    for number in layers:
        pair = work.layers[number]
        for graph in (pair.forward, pair.backward):
            for operator in graph.operators:
                seconds = costs.alone(graph, operator.name) * work.micro_batches
                found[operator.lane] = found.get(operator.lane, 0.0) + seconds
    return found


def _lanes(priceable: Priceable, step: Played, shares: Mapping[Lane, float]) -> dict[str, LaneUse]:
    work, machine, topology = priceable.work, priceable.machine, priceable.run.topology
    of_stages = [_busy(priceable, [*work.of_stage(s)]) for s in range(work.stages)]
    exposed = max(stage.exposed for stage in step.stages)
    compute = max(stage.compute for stage in step.stages)
    lanes = {str(Lane.COMPUTE): LaneUse(compute, 0.0)}
    for lane in (Lane.TP, Lane.CP, Lane.EP, Lane.OFFLOAD, Lane.FETCH, Lane.HOST):
        busy = max(own.get(lane, 0.0) for own in of_stages)
        if busy:
            level, ranks = "", 1
            if lane in LANES:
                reach = machine.reach(lane, topology)
                level, ranks = reach.name, reach.size
            lanes[str(lane)] = LaneUse(busy, exposed * shares.get(lane, 0.0), level, ranks)
    if topology.pp_size > 1:
        reach = machine.reach(Lane.PP, topology)
        waited = max(stage.transfer for stage in step.stages)
        lanes[str(Lane.PP)] = LaneUse(max(waited, _sent(priceable)), waited, reach.name, reach.size)
    if step.reduced or step.gathered:
        reach = machine.reach(Lane.DP, topology)
        bare = max(stage.reduction for stage in step.stages) + step.gathered
        lanes[str(Lane.DP)] = LaneUse(step.reduced + step.gathered, bare, reach.name, reach.size)
    return lanes


def _sent(priceable: Priceable) -> float:
    """Seconds that a stage sends in a step, at most: two chunks, each way."""
    work, link = priceable.work, priceable.link
    assert link is not None
    graph = work.layers[1].forward
    size = sum(graph.bytes_per_token.get(slot, 0.0) for slot in graph.outputs) * work.tokens
    chunks = max(len(work.placement.held(s)) for s in range(work.stages))
    return 2 * chunks * work.micro_batches * (link.latency + size / link.bandwidth)


def _stages(
    step: Played, ranks: int, memory: tuple[RankMemory, ...]
) -> tuple[StagePrediction, ...]:
    found = []
    for number, stage in enumerate(step.stages):
        visits: tuple[VisitSpan, ...] = ()
        if step.run is not None:
            visits = tuple(
                VisitSpan("+".join(map(str, one.works)), one.start, one.end)
                for one in step.run.stages[number].intervals
            )
        parts = memory[number].parts if memory else {}
        found.append(StagePrediction(number, ranks, **vars(stage), memory=parts, visits=visits))
    return tuple(found)


def _origins(priceable: Priceable) -> dict[str, float]:
    """Seconds of a stage's operators in a step, the mean, by where their times come from."""
    work, priced = priceable.work, priceable.priced
    found = dict.fromkeys(map(str, Origin), 0.0)
    for pair in work.layers:
        for graph in (pair.forward, pair.backward):
            for name in (operator.name for operator in graph.operators):
                price = priced.prices[priced.costs.key(graph, name)]
                found[str(price.origin)] += price.seconds * work.micro_batches / work.stages
    return {origin: seconds for origin, seconds in found.items() if seconds}


def _note_of_eight_bits(priceable: Priceable, fp8: str) -> str:
    """Where the times of products come from."""
    profile = priceable.conditions.profile
    graphs = () if profile is None else profile.graphs
    if any(operator.fp8 == fp8 for graph in graphs for operator in graph.operators):
        return f"fp8={fp8!r}: products are as measured; MFU is of the rate in bf16"
    form, scale = fp8_formats.FORMATS[fp8], priceable.machine.eight_bits(fp8)
    return (
        f"fp8={fp8!r}: products are derived, {form.faster * scale:.3g} times as fast as in bf16"
        f" ({form.faster_weight * scale:.3g} times those of gradients of weights); MFU is of the"
        " rate in bf16"
    )


def _notes(priceable: Priceable, step: Played, builders: Mapping[str, Builder]) -> tuple[str, ...]:
    conditions, device = priceable.conditions, priceable.conditions.device
    notes = []
    profile = conditions.profile
    if profile is None:
        notes.append(f"no profile: all operators are derived from the data sheet of {device.name}")
    elif not profile.fingerprint.device.startswith(device.name):
        notes.append(
            f"operators were measured on {profile.fingerprint.device}, and are derived for"
            f" {device.name} from data sheets"
        )
    if SEARCHED_PLAN in builders:
        notes.append(f"plan: the fastest of the built-in ones and a searched one ({step.plan})")
    elif len(builders) > 1:
        notes.append(
            f"plan: the fastest of the built-in ones ({step.plan}); a search may be faster"
        )
    if priceable.run.recompute == AUTO:
        notes.append("recompute='auto' is taken to make all of a layer again; it may make less")
    if priceable.run.offload == AUTO:
        notes.append("offload='auto' is taken to leave all on the device; it may copy some")
    if priceable.schedule:
        notes.append(
            "schedule: the fastest of those with a name and a searched one, which is"
            f" '{priceable.schedule}'"
        )
    if priceable.run.fp8 is not None:
        notes.append(_note_of_eight_bits(priceable, priceable.run.fp8))
    if priceable.run.config.num_experts:
        notes.append("experts are taken to be used evenly")
    if conditions.straggler != 1.0:
        notes.append(f"one rank of stage 0 computes {conditions.straggler:g} times slower")
    for lane, times in conditions.slower.items():
        notes.append(f"the network of lane {lane} is {times:g} times slower")
    notes.append(
        f"bars: what the origins of times allow, and {UNSURE:.1%} either way, as real steps on two"
        " H200 were from predicted ones"
    )
    return tuple(notes)
