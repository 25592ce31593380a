"""Measures cells of `dhellam bench overlap` on one rank of an emulated cluster."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_dhellam.autosearch.session import MEMORY_SLACK
from lightning_dhellam.bench.calibrate import find_rising
from lightning_dhellam.bench.cells import PUBLISHED_EXPOSED, Cell, Shape
from lightning_dhellam.bench.plans import Plans, lane_seconds
from lightning_dhellam.bench.report import Row
from lightning_dhellam.bench.rounds import Clock, Step, Times, in_turn, result_of
from lightning_dhellam.bench.views import Views
from lightning_dhellam.bench.workload import Workload, trunk
from lightning_dhellam.kernels.deterministic import deterministic
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Cluster, Link, ParallelContext
from lightning_dhellam.parallel.link import EmulatedLink, Play
from lightning_dhellam.plan import BUILDERS, Builder, Lane
from lightning_dhellam.search.model import Costs

COMPUTE, BOUND = "compute", "bound"
"""Rows that are no plans: collectives that take no time, and what no order can beat."""
_CALIBRATION_ROUNDS = 2
_CALIBRATION_STEPS = 6
_UNLIMITED = 1e15
"""Bytes per second that nothing can carry."""


@dataclass(frozen=True)
class Effort:
    """What is measured, and how often.

    Attributes:
        plans: names.
        few: micro-batches of the shorter step.
        many: micro-batches of the longer step.
        rounds: in which every step is timed once.
        repeats: runs of each operator that count.
        memory_slack: share of the memory of a step that searched plans may need on top.
    """

    plans: tuple[str, ...]
    few: int
    many: int
    rounds: int
    repeats: int
    memory_slack: float = MEMORY_SLACK


@dataclass(frozen=True)
class Outcome:
    """Of one cell.

    Attributes:
        rows: of the table.
        note: what else is to be said about it.
        views: timelines to draw.
    """

    rows: list[Row]
    note: str
    views: Views

    def draw(self, path: Path) -> None:
        """Write the timelines as a picture."""
        self.views.draw(path)


@contextmanager
def rank_of(cluster: Cluster, ranks: int, device: torch.device) -> Iterator[ParallelContext]:
    """Play a rank of `cluster`, whose tensor-parallel groups have `ranks` ranks."""
    cluster.join()
    try:
        context = ParallelContext.create(device, tensor_parallel_size=ranks, cluster=cluster)
        try:
            yield context
        finally:
            context.destroy()
    finally:
        dist.destroy_process_group()


class Stage:
    """Holds one model at a time, and measures cells of its shape.

    Args:
        context: of an emulated cluster.
        shapes: by letter.
        effort: what to measure.
        slower: times that links are slower than their cells say.
    """

    def __init__(
        self,
        context: ParallelContext,
        shapes: Mapping[str, Shape],
        effort: Effort,
        slower: float = 1.0,
    ) -> None:
        self._context = context
        self._shapes = shapes
        self._effort = effort
        self._slower = slower
        self._link: EmulatedLink = context.links[Lane.TP]
        self._clock = Clock(context.device)
        self._model: tuple[str, int, CausalLM] | None = None
        self._searched: dict[tuple[str, int, Link, int], Plans] = {}

    def measure(self, cell: Cell) -> Outcome:
        """Profile, search, compare results, and time every plan of one cell."""
        work = self._workload(cell)
        self._link.play = Play.TIME
        link = cell.link.slower(self._slower)
        if cell.calibrated:
            link = self._calibrated(work, replace(cell, link=link))
        self._link.become(link)
        note = f"link {self._link.calibrated(self._crossing(work))}"
        plans = self._plans(work, replace(cell, link=link))
        steps = {name: self._steps(work, builder) for name, builder in plans.builders.items()}
        parity = self._parity(cell, plans)
        self._free()
        peaks = {name: self._peak(work, pair[1]) for name, pair in steps.items()}
        steps[COMPUTE] = self._compute(work)
        timed = in_turn(steps, self._clock, self._effort.rounds)
        rows = self._rows(cell, work, plans, timed, parity, peaks)
        views = Views.of(f"EMULATED {cell.name}, {link}", work, plans)
        return Outcome(rows, f"{note}. {_searched(plans)}", views)

    def recover(self) -> None:
        """Let go of what a cell that failed may have left."""
        self._model = None
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
        self._link.refill()

    def _workload(self, cell: Cell) -> Workload:
        shape = self._shapes[cell.shape]
        if self._model is None or self._model[0] != cell.shape or self._model[1] < cell.layers:
            self._model = None
            self._free()
            on_gpu = self._context.device.type == "cuda"
            dtype = torch.bfloat16 if on_gpu else torch.float32
            config = replace(shape.config, num_layers=cell.layers)
            model = CausalLM(config, self._context, dtype).to(self._context.device)
            self._model = (cell.shape, cell.layers, model)
        size = (shape.length, shape.micro_batch, self._effort.many)
        return trunk(
            self._model[2],
            cell.layers,
            *size,
            priority=cell.priority,
            processors=cell.link.sms,
        )

    def _steps(self, work: Workload, builder: Builder) -> tuple[Step, Step]:
        """A short and a long step under the plans of `builder`."""
        engine, few, many = work.engine(builder), work.pieces[: self._effort.few], work.pieces
        return (lambda: engine.train(few)), (lambda: engine.train(many))

    def _compute(self, work: Workload) -> tuple[Step, Step]:
        """A short and a long step of compute alone."""
        few, many = self._steps(work, BUILDERS["interleaved"])
        return self._silent(few), self._silent(many)

    def _silent(self, step: Step) -> Step:
        def run() -> torch.Tensor:
            self._link.play = Play.NOTHING
            try:
                return step()
            finally:
                self._link.play = Play.TIME

        return run

    def _calibrated(self, work: Workload, cell: Cell) -> Link:
        """The cell's link with the bandwidth at which Megatron's order exposes what it should."""
        megatron = self._steps(work, BUILDERS["megatron"])
        steps = {"megatron": megatron, COMPUTE: self._compute(work)}
        # Processors move bytes only so fast. How fast is measured before steps make the device hot:
        # a transfer that is exposed runs while it is cool.
        self._link.become(replace(cell.link, bandwidth=_UNLIMITED))
        (crossing,) = self._crossing(work)
        fastest = self._link.calibration(crossing)[1] / crossing

        def exposed(slowness: float) -> float:
            self._link.become(replace(cell.link, bandwidth=1 / slowness))
            timed = in_turn(steps, self._clock, _CALIBRATION_ROUNDS)
            # Of steps: the difference of two, as of a layer, is uncertain by some percent.
            return timed["megatron"][1].median / timed[COMPUTE][1].median - 1

        slowness = find_rising(
            exposed, PUBLISHED_EXPOSED, 1 / cell.link.bandwidth, _CALIBRATION_STEPS, fastest
        )
        return replace(cell.link, bandwidth=1 / slowness)

    def _slope(self, cell: Cell, few: float, many: float) -> float:
        """Seconds of a layer and micro-batch, from those of two steps."""
        return (many - few) / ((self._effort.many - self._effort.few) * cell.layers)

    def _plans(self, work: Workload, cell: Cell) -> Plans:
        """Of this shape, link and number of layers, on which the memory of a step depends."""
        key = (cell.shape, cell.layers, cell.link, cell.priority)
        if key not in self._searched:
            costs = Costs.of(work.profile(repeats=self._effort.repeats))
            sequential = self._steps(work, BUILDERS["sequential"])[1]
            self._searched[key] = Plans.of(
                work.layers,
                costs,
                self._effort.plans,
                tokens=work.tokens,
                memory_slack=self._peak(work, sequential) * self._effort.memory_slack,
            )
        return self._searched[key]

    def _parity(self, cell: Cell, plans: Plans) -> dict[str, tuple[float, str]]:
        """How far results are from the sequential plan's, and which of them is farthest.

        Collectives bring numbers, and kernels add up in a fixed order: the fastest gradient of
        attention does not, which alone makes results differ from run to run.
        """
        self._link.play = Play.ECHO
        try:
            with deterministic():
                work = self._workload(cell)
                steps = {name: self._steps(work, b)[1] for name, b in plans.builders.items()}
                return _farthest(work, steps)
        finally:
            self._link.play = Play.TIME

    def _crossing(self, work: Workload) -> tuple[int, ...]:
        """Bytes that cross the link for a collective of these layers."""
        shape = work.layers[1].forward.bytes_per_token
        return (
            round(shape["attention_norm"] * (self._context.topology.tp_size - 1) * work.tokens),
        )

    def _peak(self, work: Workload, step: Step) -> float:
        """Most bytes in use during a step: of the device, on a CPU of slots."""
        if self._context.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            return float(torch.cuda.max_memory_allocated())
        work.lanes.ledger.peak_bytes = work.lanes.ledger.bytes
        step()
        return float(work.lanes.ledger.peak_bytes)

    def _rows(
        self,
        cell: Cell,
        work: Workload,
        plans: Plans,
        timed: Mapping[str, Sequence[Times]],
        parity: Mapping[str, tuple[float, str]],
        peaks: Mapping[str, float],
    ) -> list[Row]:
        layer = {
            name: self._slope(cell, few.median, many.median) for name, (few, many) in timed.items()
        }
        compute, megatron, tokens = layer[COMPUTE], layer["megatron"], work.tokens
        bound = max(compute, lane_seconds(work.layers[1:2], plans.costs)[Lane.TP])
        rows: list[Row] = []
        for name in (BOUND, COMPUTE, *plans.builders):
            seconds = bound if name == BOUND else layer[name]
            row: Row = {"cell": cell.name, "plan": name, "layer ms": seconds * 1e3}
            row |= {"over megatron": megatron / seconds, "of bound": bound / seconds}
            if name != BOUND:
                step = timed[name][1]
                row |= {"step ms": step.median * 1e3, "spread ms": step.spread * 1e3}
            if name in plans.builders:
                few, many = (
                    plans.simulate(work.layers, name, count, tokens).seconds
                    for count in (self._effort.few, self._effort.many)
                )
                predicted = self._slope(cell, few, many)
                row |= {
                    "exposed ms": (seconds - compute) * 1e3,
                    "predicted ms": predicted * 1e3,
                    "error": predicted / seconds - 1,
                    "step error": many / step.median - 1,
                    "peak GiB": peaks[name] / 2**30,
                    "of sequential": peaks[name] / peaks["sequential"],
                    "parity": parity[name][0],
                    "farthest": parity[name][1],
                    "search s": plans.search_seconds.get(name),
                }
            rows.append(row)
        return rows


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
    """What the search says about its own plan."""
    parts = [f"search {name} {s:.1f} s" for name, s in plans.search_seconds.items()]
    if "auto" in plans.solutions:
        parts.append(f"auto {plans.solutions['auto'].main}")
    return "; ".join(parts)
