"""The schedules that have a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning_dhellam.nearest import suggestion
from lightning_dhellam.pipeline.schedules.folded import dual_pipe_v, fold, zero_bubble_v
from lightning_dhellam.pipeline.schedules.schedule import Schedule
from lightning_dhellam.pipeline.schedules.straight import interleaved_1f1b, one_f_one_b
from lightning_dhellam.pipeline.schedules.verify import verify
from lightning_dhellam.pipeline.schedules.work import ScheduleError
from lightning_dhellam.plan.by_layer import USUAL, ByLayer, keeps_most
from lightning_dhellam.plan.offloading import Offload
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.plan.placement import Placement

Scheme = Callable[[int, int], Schedule]
"""Makes a schedule of stages and micro-batches; refuses numbers with a `ScheduleError`."""

AUTO = "auto"
"""In place of a name: the best is searched in the first steps of a run."""
SCHEDULES: Mapping[str, Scheme] = {
    "1f1b": one_f_one_b,
    "interleaved-1f1b": interleaved_1f1b,
    "zb-v": zero_bubble_v,
    "dualpipe-v": dual_pipe_v,
    "fold": fold,
}
"""Schedules by the names that users know: those that a pipeline is trained by.

`interleaved-1f1b` has two chunks a stage, `interleaved-1f1b-4` four.
"""


@dataclass(frozen=True, eq=False)
class Written:
    """The schedule of a file. Steps of fewer micro-batches leave out the works of the others.

    Attributes:
        schedule: what the file says.
        path: of the file.
    """

    schedule: Schedule
    path: str

    def __call__(self, stages: int, micro_batches: int) -> Schedule:
        """Return the schedule. Raises ScheduleError where it is of other numbers."""
        known = self.schedule
        if stages != known.stages:
            raise ScheduleError(
                f"schedule={self.path!r} is of {known.stages} stages, but pipeline_parallel_size is"
                f" {stages}: give one of so many"
            )
        if micro_batches > known.micro_batches:
            raise ScheduleError(
                f"schedule={self.path!r} is of {known.micro_batches} micro-batches, and a batch has"
                f" {micro_batches}: give one of so many, or the name of a schedule"
            )
        return known.of_first(micro_batches)


@dataclass(frozen=True, eq=False)
class Found:
    """A schedule that was searched for steps of so many micro-batches; others go by another.

    Attributes:
        schedule: what was found.
        otherwise: makes the schedules of steps of more or fewer micro-batches.
    """

    schedule: Schedule
    otherwise: Scheme

    def __call__(self, stages: int, micro_batches: int) -> Schedule:
        """Return the schedule of a step."""
        if (stages, micro_batches) == (self.schedule.stages, self.schedule.micro_batches):
            return self.schedule
        return self.otherwise(stages, micro_batches)


def content(scheme: Scheme, stages: int) -> str:
    """What a scheme makes, printed: what ranks compare, since names and paths say too little."""
    if isinstance(scheme, Written):
        return str(scheme.schedule)
    if isinstance(scheme, Found):
        return f"{scheme.schedule}\n{content(scheme.otherwise, stages)}"
    return str(scheme(stages, 2 * stages + 1))  # of a name: in the steady state, and beyond


def kept(name: str, scheme: Scheme) -> dict[str, Any]:
    """Return a schedule that was chosen as plain values, for `restored`."""
    if not isinstance(scheme, Found):
        return {"name": name}
    (otherwise,) = (known for known, make in SCHEDULES.items() if make is scheme.otherwise)
    return {"name": name, "table": str(scheme.schedule).splitlines(), "otherwise": otherwise}


def restored(fields: Mapping[str, Any], stages: int) -> tuple[str, Scheme]:
    """Return the name of a schedule that was kept, and what makes it.

    Raises:
        ScheduleError: it is none for so many stages.
    """
    if "table" not in fields:
        return fields["name"], scheme_of(fields["name"], stages)
    found = Schedule.parse("\n".join(fields["table"]))
    verify(found)
    otherwise = scheme_of(fields["otherwise"], stages)
    if found.placement != otherwise(stages, 1).placement:
        raise ScheduleError(
            f"schedule '{fields['name']}' is of chunks on stages {found.placement}, and"
            f" pipeline_parallel_size is {stages}: search again"
        )
    return fields["name"], Found(found, otherwise)


def counts_of(scheme: Scheme, stages: int) -> tuple[int, ...]:
    """Return numbers of micro-batches whose steps, together, have every kind of visit."""
    some = range(1, 2 * stages + 2)
    if isinstance(scheme, Written):
        known = scheme.schedule.micro_batches
        return (*(count for count in some if count < known), known)
    if isinstance(scheme, Found):
        return (*counts_of(scheme.otherwise, stages), scheme.schedule.micro_batches)
    return tuple(some)


def playable(placement: Placement) -> dict[str, Scheme]:
    """Return the schedules with a name that layers can be trained by where they lie."""
    stages = placement.stages
    return {
        name: make for name, make in SCHEDULES.items() if make(stages, 1).placement == placement
    }


def begun(
    schedule: str | None,
    stages: int,
    shared: Iterable[int],
    recompute: Recompute | ByLayer = USUAL,
    offload: Offload = None,
) -> str:
    """Return the schedule that a run begins with: its own, or the usual one, which folds layers.

        one stage                           `fold`: each forward beside a backward
        backward makes again, or fetches    `fold`: takes no backward apart
        layers communicate                  `dualpipe-v`: two strands, but at the ends of a step
        all others                          `zb-v`: the least bubble, and nothing to hide

    Against `fold`, two stages of 70B width without tensor parallelism on two H200 (2026-11-30) take
    0.90 of the time by `zb-v` and 0.95 by `dualpipe-v` with 8 micro-batches, in no more memory.
    From data sheets of H200 with TP 8, two stages and 2 to 8 micro-batches, `dualpipe-v` is
    predicted to take 0.93 to 0.99 of the fold's time, and `zb-v` up to 1.02. What backward has made
    again stays until gradients of weights have read it: in `zb-v` of up to 2P - 1 chunks, in
    `dualpipe-v` of P.

    Args:
        schedule: as the run was given it; None or `AUTO` where it names none.
        stages: how many there are, P.
        shared: how many ranks share a layer, a sequence, and the experts of a layer.
        recompute: what backward makes again; more than is gathered counts.
        offload: what waits in host memory.
    """
    if schedule is not None and schedule != AUTO:
        return schedule
    if stages == 1 or offload is not None or not keeps_most(recompute):
        return "fold"
    return "dualpipe-v" if max(shared) > 1 else "zb-v"


def named(schedule: str) -> Scheme | None:
    """Return what makes the schedules of a name, or None if it is none."""
    rounds = _ROUNDS.fullmatch(schedule)
    if rounds is not None and int(rounds[1]):
        return _of_rounds(int(rounds[1]))
    return SCHEDULES.get(schedule)


def scheme_of(schedule: str, stages: int) -> Scheme:
    """What makes the schedules of a run: of that name, or of the file of that path.

    Raises:
        ScheduleError: an unknown name, or a file that holds no schedule for so many stages or one
            that cannot be carried out.
    """
    scheme = named(schedule)
    if scheme is None and Path(schedule).suffix:
        scheme = _written(schedule)
        verify(scheme(stages, 1))
    if scheme is None:
        raise ScheduleError(
            f"schedule='{schedule}' is not a known schedule: use {' or '.join(SCHEDULES)} or"
            f" {AUTO}, or the path of a file that holds one" + suggestion(schedule, SCHEDULES)
        )
    return scheme


def placement_of(schedule: str | None, stages: int) -> Placement:
    """Where the layers of a run lie: which stage holds which chunk of them.

    They are folded where a run names no schedule (None), or is to search it (`AUTO`).

    Raises:
        ScheduleError: see `scheme_of`.
    """
    if schedule is None or schedule == AUTO:
        return Placement.folded(stages)
    return placed(scheme_of(schedule, stages), stages)


@cache
def placed(scheme: Scheme, stages: int) -> Placement:
    """Where the chunks of a scheme's schedules lie.

    Whoever looks at thousands of runs asks for it thousands of times.
    """
    return scheme(stages, 1).placement


def check_placed(schedule: str, scheme: Scheme, placement: Placement) -> None:
    """Refuse a schedule whose chunks lie elsewhere than those of a model that was built.

    Raises:
        ScheduleError: with both placements.
    """
    stages = placement.stages
    its = scheme(stages, 1).placement
    if stages > 1 and its != placement:
        raise ScheduleError(
            f"schedule='{schedule}' has its chunks on stages {its}, and the model was built with"
            f" them on {placement}: use {' or '.join(playable(placement)) or 'a file'}"
        )


_ROUNDS = re.compile(r"interleaved-1f1b-(\d+)")


@cache
def _of_rounds(rounds: int) -> Scheme:
    return partial(interleaved_1f1b, rounds=rounds)


def _written(path: str) -> Written:
    try:
        known = Schedule.parse(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"schedule={path!r} cannot be read: {error}") from None
    except ScheduleError as error:
        raise ScheduleError(f"schedule={path!r} is {error}") from None
    verify(known)
    return Written(known, path)
