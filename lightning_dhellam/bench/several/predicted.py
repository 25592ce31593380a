"""What `dhellam bench several` has measured beside what is predicted of it, on no GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning_dhellam.advice import Conditions, memory_of, predict
from lightning_dhellam.bench.several.job import AUTO, OURS
from lightning_dhellam.bench.shapes import shapes
from lightning_dhellam.memory import RankMemory, Run
from lightning_dhellam.parallel import Topology
from lightning_dhellam.pipeline.schedules import Placement, playable
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.by_layer import USUAL

CLOSE, CLOSE_BYTES, APART = 0.05, 0.03, 0.03
"""How far a step and a peak of memory may be predicted wrongly, and how far apart two steps must be
for their order to count."""
_CASE = re.compile(r"(?P<shape>[a-z])\d+ tp(\d+) pp(\d+)(?: cp(\d+))?(?: ep(\d+))?(?: dp(\d+))?")
_USUAL_COUNT = 4
"""Micro-batches of a step where a file does not say it, as older ones do not."""


@dataclass(frozen=True)
class Beside:
    """A step that was measured, and what was predicted of it.

    Attributes:
        name: case, micro-batches, schedule and plan.
        measured: seconds up to the last gradient.
        predicted: the same.
        low: seconds that were predicted at least.
        high: seconds that were predicted at most.
        bytes: most memory that was measured on a rank; None where nothing says it.
        predicted_bytes: the same, predicted; 0 where nothing says it.
    """

    name: str
    measured: float
    predicted: float
    low: float
    high: float
    bytes: float | None
    predicted_bytes: float

    @property
    def error(self) -> float:
        """Share of the measured time by which the predicted one is longer."""
        return self.predicted / self.measured - 1

    @property
    def memory_error(self) -> float | None:
        """Share of the measured memory by which the predicted one is more."""
        return None if self.bytes is None else self.predicted_bytes / self.bytes - 1


def kept_profile(report: Path, case: str) -> Path | None:
    """The profile of a case's first rank, which the benchmark keeps beside its report."""
    home = report.parent / "several" / case.replace(" ", "-") / OURS
    paths = (home / name for name in ("profile.json", "profile-stage0.json"))
    return next((path for path in paths if path.exists()), None)


def besides(
    report: Mapping[str, Any],
    conditions: Conditions | Callable[[str], Conditions],
    vocabulary: int,
    rehearse: bool = False,
) -> Iterator[Beside]:
    """Predict each step of ours in a report whose plan is built in, or was searched.

    Args:
        report: what a file of `dhellam bench several` holds.
        conditions: cluster and profile, or those of each case.
        vocabulary: tokens of the model's vocabulary.
        rehearse: whether it was a rehearsal in miniature.

    Raises:
        ValueError: a case is none.
    """
    memories: dict[Run, tuple[RankMemory, ...]] = {}
    for row in report["rows"]:
        plan = row.get("plan")
        if row.get("side") != OURS or "step ms" not in row or plan not in {*BUILDERS, AUTO}:
            continue
        schedule = row.get("schedule", "").removeprefix(f"{AUTO}: ")
        if schedule not in ("", *playable(Placement.folded(2))):
            continue  # one that was searched, which is in no other run
        run = _run({**row, "schedule": schedule}, vocabulary, rehearse)
        known = conditions if isinstance(conditions, Conditions) else conditions(row["case"])
        found = predict(run, known)
        # What is uncertain of a step is of its optimizer too.
        share = 1 - found.stages[0].optimizer / found.seconds
        same, peak = replace(run, plan="interleaved"), row.get("peak GiB")
        if peak is not None and same not in memories:
            memories[same] = memory_of(same)
        yield Beside(
            " ".join(
                [row["case"], f"m{found.choice.micro_batches}", row.get("schedule", ""), plan]
            ).replace("  ", " "),
            row["step ms"] / 1e3,
            share * found.seconds,
            share * found.low,
            share * found.high,
            None if peak is None else peak * 2**30,
            max((rank.allocated for rank in memories.get(same, ())), default=0),
        )


def verdict(rows: Iterable[Beside]) -> list[str]:
    """Return in lines how many predictions are as close as they should be."""
    every = [*rows]
    close = sum(abs(row.error) <= CLOSE for row in every)
    lines = [f"{close} of {len(every)} steps are predicted within {CLOSE:.0%}"]
    apart = [
        (a, b)
        for a, b in combinations(every, 2)
        if abs(a.measured / b.measured - 1) > APART and _same_work(a, b)
    ]
    right = sum((a.measured > b.measured) == (a.predicted > b.predicted) for a, b in apart)
    lines.append(
        f"{right} of {len(apart)} pairs of one case that differ by more than {APART:.0%} are in the"
        " right order"
    )
    known = [error for row in every if (error := row.memory_error) is not None]
    if known:
        near = sum(abs(error) <= CLOSE_BYTES for error in known)
        lines.append(f"{near} of {len(known)} peaks of memory are within {CLOSE_BYTES:.0%}")
    return lines


def _same_work(a: Beside, b: Beside) -> bool:
    """Whether two steps train one model on as many micro-batches."""
    words = [row.name.split() for row in (a, b)]
    counts = [next(word for word in own if word.startswith("m")) for own in words]
    return words[0][0] == words[1][0] and counts[0] == counts[1]


def _run(row: Mapping[str, Any], vocabulary: int, rehearse: bool) -> Run:
    match = _CASE.fullmatch(row["case"])
    known = shapes(rehearse)
    if match is None or match["shape"] not in known:
        raise ValueError(
            f"case '{row['case']}' is none of `dhellam bench several`, such as 'a8 tp2 pp1': give a"
            " file that it has written"
        )
    tp, pp, cp, ep, dp = (int(size or 1) for size in match.groups()[1:])
    shape = known[match["shape"]]
    config = replace(shape.config, vocab_size=vocabulary, num_layers=row["layers"])
    count = row.get("micro-batches", _USUAL_COUNT)
    return Run(
        config,
        Topology(world_size=tp * pp * cp * ep * dp, tp_size=tp, pp_size=pp, cp_size=cp, ep_size=ep),
        count * shape.micro_batch,
        shape.length,
        micro_batch_size=shape.micro_batch,
        precision="32-true" if rehearse else "bf16-mixed",
        plan=row["plan"],
        recompute=USUAL,
        schedule=row.get("schedule") or "fold",
        context_exchange=row.get("details", {}).get("exchange") or "ring",
    )
