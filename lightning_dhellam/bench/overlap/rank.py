"""Measures the cells of `dhellam bench overlap` on one rank of an emulated cluster."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isnan

import torch

from lightning_dhellam.bench.overlap.again import Again, fitted, saved_by_none, saved_of
from lightning_dhellam.bench.overlap.calibrate import find_rising
from lightning_dhellam.bench.overlap.cells import PUBLISHED_EXPOSED, Cell
from lightning_dhellam.bench.overlap.cut import cost_of_cutting
from lightning_dhellam.bench.overlap.report import COMPUTE, PlanFigures, rows_of
from lightning_dhellam.bench.overlap.settings import Settings
from lightning_dhellam.bench.overlap.views import Views
from lightning_dhellam.bench.plans import Plans, budget_within, lane_seconds
from lightning_dhellam.bench.report import Row
from lightning_dhellam.bench.rounds import Step, Timer, in_turn, result_of
from lightning_dhellam.bench.shapes import Shape
from lightning_dhellam.bench.workload import Workload, trunk
from lightning_dhellam.kernels.deterministic import deterministic
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Link, ParallelContext
from lightning_dhellam.parallel.link import EmulatedLink, Play
from lightning_dhellam.plan import BUILDERS, Builder, Lane
from lightning_dhellam.plan.by_layer import ByLayer
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.search.model import Costs

_CALIBRATION_ROUNDS = 2
_CALIBRATION_STEPS = 6
_UNLIMITED = 1e15
"""Bytes per second that nothing can carry."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one cell.

    Attributes:
        rows: The cell's rows of the table.
        note: What else is to be said about it.
        views: Timelines to draw.
    """

    rows: list[Row]
    note: str
    views: Views


class Rank:
    """One rank of an emulated cluster: holds one model at a time, and measures cells of its shape.

    Args:
        context: Of the emulated cluster.
        shapes: The shapes by letter.
        settings: What to measure, and how often.
        slower: Times that links are slower than their cells say.
    """

    def __init__(
        self,
        context: ParallelContext,
        shapes: Mapping[str, Shape],
        settings: Settings,
        slower: float = 1.0,
    ) -> None:
        self._context = context
        self._shapes = shapes
        self._settings = settings
        self._slower = slower
        self._links: Mapping[Lane, EmulatedLink] = context.links
        self._timer = Timer(context.device)
        self._model: tuple[str, int, CausalLM] | None = None
        self._searched: dict[Cell, Plans] = {}

    def measure(self, cell: Cell) -> Measured:
        """Profile, search, compare results, and time every plan of one cell."""
        work = self._workload(cell, cell.recompute if cell.share is None else "full")
        self._play(Play.TIME)
        link = cell.link.slower(self._slower)
        if cell.context_link is not None:
            self._links[Lane.CP].become(cell.context_link.slower(self._slower))
        if cell.calibrated:
            link = self._calibrated(work, replace(cell, link=link))
        self._links[cell.lane].become(link)
        crossing = self._crossing(work, cell.lane)
        note = f"link {self._links[cell.lane].calibrated((crossing,))}"
        again = self._again(cell)
        works = again.works(partial(self._workload, cell), self._settings.plans)
        work = works["sequential"]
        plans = self._plans(work, replace(cell, link=link), again)
        steps = {name: self._steps(works[name], one) for name, one in plans.builders.items()}
        parity = self._parity(cell, again, plans)
        self._free()
        length = self._shapes[cell.shape].length
        kept = saved_by_none(work, cell, length)
        figures = {
            name: PlanFigures(
                self._predicted(works[name], plans, name),
                *self._peaks(works[name], many),
                *parity[name],
                plans.search_seconds.get(name),
                saved_of(works[name].layers[1:-1], work.tokens),
                kept,
                again.said(name),
                again.limit,
            )
            for name, (_, many) in steps.items()
        }
        steps[COMPUTE] = self._compute(work)
        timed = in_turn(steps, self._timer, self._settings.rounds)
        more = self._settings.many - self._settings.few
        busy = lane_seconds(work.layers[1:-1], plans.costs)
        busiest = max(busy[lane] for lane in self._links) / cell.layers
        note += _rows(work) + self._cut(cell, work, plans.costs)
        if again.note:
            note += f"; {again.note}"
        rows = rows_of(cell, more, busiest, timed, figures)
        views = Views.of(f"EMULATED {cell.name}, {link}", work, plans)
        return Measured(rows, f"{note}. {_searched(plans)}", views)

    def recover(self) -> None:
        """Let go of what a cell that failed may have left."""
        self._model = None
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
        for link in self._links.values():
            link.refill()

    def _play(self, play: Play) -> None:
        for link in self._links.values():
            link.play = play

    def _again(self, cell: Cell) -> Again:
        """What backward makes again in the cell: what it says, or what fits."""
        if cell.share is None:
            return Again(cell.recompute, cell.recompute)
        make = partial(self._workload, cell)
        return fitted(make, cell.share, self._settings.repeats, self._settings.memory_slack)

    def _workload(self, cell: Cell, recompute: Recompute | ByLayer) -> Workload:
        shape = self._shapes[cell.shape]
        if self._model is None or self._model[0] != cell.shape or self._model[1] < cell.layers:
            self._model = None
            self._free()
            on_gpu = self._context.device.type == "cuda"
            dtype = torch.bfloat16 if on_gpu else torch.float32
            config = replace(shape.config, num_layers=cell.layers)
            model = CausalLM(config, self._context, dtype).to(self._context.device)
            self._model = (cell.shape, cell.layers, model)
        return trunk(
            self._model[2],
            cell.layers,
            shape.length,
            shape.micro_batch,
            self._settings.many,
            priority=cell.priority,
            processors=cell.processors,
            context_exchange=cell.exchange,
            recompute=recompute,
            **cell.eight_bits,
        )

    def _steps(self, work: Workload, builder: Builder) -> tuple[Step, Step]:
        """A short and a long step under the plans of `builder`."""
        engine, few, many = work.engine(builder), work.pieces[: self._settings.few], work.pieces
        return (lambda: engine.train(few)), (lambda: engine.train(many))

    def _compute(self, work: Workload) -> tuple[Step, Step]:
        """A short and a long step of compute alone."""
        few, many = self._steps(work, BUILDERS["interleaved"])
        return self._silent(few), self._silent(many)

    def _silent(self, step: Step) -> Step:
        def run() -> torch.Tensor:
            self._play(Play.NOTHING)
            try:
                return step()
            finally:
                self._play(Play.TIME)

        return run

    def _calibrated(self, work: Workload, cell: Cell) -> Link:
        """The cell's link with the bandwidth at which Megatron's order exposes what it should."""
        megatron = self._steps(work, BUILDERS["megatron"])
        steps = {"megatron": megatron, COMPUTE: self._compute(work)}
        # Processors move bytes only so fast. How fast is measured before steps make the device hot:
        # a transfer that is exposed runs while it is cool.
        played = self._links[cell.lane]
        played.become(replace(cell.link, bandwidth=_UNLIMITED))
        crossing = self._crossing(work, cell.lane)
        fastest = played.calibration(crossing)[1] / crossing

        def exposed(slowness: float) -> float:
            played.become(replace(cell.link, bandwidth=1 / slowness))
            timed = in_turn(steps, self._timer, _CALIBRATION_ROUNDS)
            # Of steps: the difference of two, as of a layer, is uncertain by some percent.
            return timed["megatron"][1].median / timed[COMPUTE][1].median - 1

        slowness = find_rising(
            exposed, PUBLISHED_EXPOSED, 1 / cell.link.bandwidth, _CALIBRATION_STEPS, fastest
        )
        return replace(cell.link, bandwidth=1 / slowness)

    def _plans(self, work: Workload, cell: Cell, again: Again) -> Plans:
        """The plans for this shape and link, and for as many layers: a step's memory asks for it.

        They are searched once and kept. Where no costs are known they are measured. Where slots
        have a limit, so has what these plans may take above the sequential one.
        """
        key = replace(cell, lever="")
        if key not in self._searched:
            costs = again.costs
            if costs is None:
                costs = Costs.of(work.profile(repeats=self._settings.repeats))
            sequential = self._steps(work, BUILDERS["sequential"])[1]
            peak, slots = self._peaks(work, sequential)
            slack = peak * self._settings.memory_slack
            if again.limit is not None:
                slack = max(0.0, min(slack, again.limit - slots))
            seconds, tokens = self._settings.search_time, work.tokens
            self._searched[key] = Plans.of(
                work.layers,
                costs,
                self._settings.plans,
                tokens=tokens,
                memory_slack=slack,
                budget=budget_within(
                    seconds, work.layers, costs, tokens=tokens, memory_slack=slack
                ),
            )
        return self._searched[key]

    def _predicted(self, work: Workload, plans: Plans, name: str) -> tuple[float, float]:
        """Seconds of the shorter and the longer step by the simulator."""
        few, many = (
            plans.simulate(work.layers, name, count, work.tokens).seconds
            for count in (self._settings.few, self._settings.many)
        )
        return few, many

    def _cut(self, cell: Cell, work: Workload, costs: Costs) -> str:
        """What attention costs since sequences are shared; nothing if they are not."""
        shape = self._shapes[cell.shape]
        if shape.context_ranks == 1:
            return ""
        found = cost_of_cutting(work, costs, shape.length, shape.micro_batch)
        return f"; attention {found:.3f} × a {shape.context_ranks}th of the uncut one"

    def _parity(self, cell: Cell, again: Again, plans: Plans) -> dict[str, tuple[float, str]]:
        """How far results are from the sequential plan's, and which of them is farthest.

        Collectives bring numbers, and kernels add up in a fixed order: the fastest gradient of
        attention does not, which alone makes results differ from run to run.
        """
        self._play(Play.ECHO)
        try:
            with deterministic():
                works = again.works(partial(self._workload, cell), self._settings.plans)
                steps = {n: self._steps(works[n], b)[1] for n, b in plans.builders.items()}
                return _farthest(works["sequential"], steps)
        finally:
            self._play(Play.TIME)

    def _crossing(self, work: Workload, lane: Lane) -> int:
        """Bytes that cross the link of `lane` for the largest collective of a layer's forward."""
        forward = work.layers[1].forward
        sizes = forward.bytes_per_token
        brought = max(
            sum(sizes[slot] for slot in operator.writes)
            for operator in forward.operators
            if operator.lane is lane
        )
        return round(brought * (1 - 1 / self._context.topology.size(lane)) * work.tokens)

    def _peaks(self, work: Workload, step: Step) -> tuple[float, float]:
        """The most bytes during a step: of the device, on a CPU of slots; and of slots."""
        ledger, on_gpu = work.lanes.ledger, self._context.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        ledger.peak_bytes = ledger.bytes
        step()
        slots = float(ledger.peak_bytes)
        if not on_gpu:
            return slots, slots
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated()), slots


def _rows(work: Workload) -> str:
    """How many rows this rank's experts compute, which what arrives decides; nothing if none."""
    topology, experts = work.model.context.topology, work.model.config.num_experts
    if experts is None:
        return ""
    layers = len(work.layers) - 2
    load = work.loads(range(layers), experts)
    own = load.view(layers, topology.ep_size, -1)[:, topology.ep_rank].sum(1)
    low, high = (own * topology.ep_size / load.sum(1)).aminmax()
    return f"; rows of a layer {low:.0%} to {high:.0%} of an even share"


def _farthest(work: Workload, steps: Mapping[str, Step]) -> dict[str, tuple[float, str]]:
    """The largest error of each step's results against the sequential one's, and what has it."""
    names = {id(p): name for name, p in work.model.named_parameters()}
    results = ["loss", *(names[id(p)] for p in work.parameters)]
    reference = result_of(steps["sequential"], work.parameters)
    found = {}
    for name, step in steps.items():
        errors = result_of(step, work.parameters).errors(reference)
        # One that is no number is larger than any.
        error, where = max(
            zip(errors, results, strict=True), key=lambda one: (isnan(one[0]), one[0])
        )
        found[name] = (error, where if error else "-")
    return found


def _searched(plans: Plans) -> str:
    """How long searches took, and what the search says about its own plan."""
    parts = [f"search {name} {s:.1f} s" for name, s in plans.search_seconds.items()]
    if "auto" in plans.solutions:
        parts.append(f"auto {plans.solutions['auto'].main}")
    return "; ".join(parts)
