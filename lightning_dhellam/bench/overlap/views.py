"""Timelines of real and simulated steps, for the pictures of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_dhellam.autosearch.timing import intervals
from lightning_dhellam.bench.plans import Plans
from lightning_dhellam.bench.workload import Workload
from lightning_dhellam.plan import Strand
from lightning_dhellam.search.model import Interval, Timeline

_SHOWN = 2
"""Pairs of layers that are shown."""
_MEASURED = ("megatron", "dhellam", "auto")


@dataclass(frozen=True)
class Views:
    """Timelines of some layers in the middle of a step, by their titles."""

    timelines: Mapping[str, Sequence[Interval]]

    @classmethod
    def of(cls, title: str, work: Workload, plans: Plans) -> Views:
        """Trace a step of the plans that are shown, and simulate one of `auto`."""
        found = {}
        count = len(work.pieces)
        for name in _MEASURED:
            if name in plans.builders:
                engine = work.engine(plans.builders[name])
                engine.train(work.pieces)  # not the first step, which makes the programs
                with engine.traced(work.model.context.device) as tracer:
                    engine.train(work.pieces)
                rows = intervals(tracer.spans())
                found[f"{title} · {name}, measured"] = _middle(rows)
        if "auto" in plans.builders:
            simulated = plans.simulate(work.layers, "auto", count)
            found[f"{title} · auto, predicted"] = _middle(simulated.intervals)
        return cls(found)

    def draw(self, path: Path) -> None:
        """Write the timelines below each other as a picture."""
        # Drawing needs matplotlib, which nothing else here does.
        from lightning_dhellam.search.report.pictures import Panel, save_timeline

        save_timeline(path, [Panel(title, rows) for title, rows in self.timelines.items()])


def _middle(rows: Sequence[Interval]) -> tuple[Interval, ...]:
    """Some layers of the second micro-batch's way forward, with time 0 at their start."""
    first = (max(row.layer for row in rows) + 1 - _SHOWN) // 2

    def begin(layer: int) -> float:
        return min(
            row.start
            for row in rows
            if row.strand is Strand.FORWARD and row.layer == layer and row.micro_batch == 1
        )

    return Timeline(tuple(rows)).between(begin(first), begin(first + _SHOWN))
