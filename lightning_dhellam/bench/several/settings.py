"""What `dhellam bench several` is told."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.bench.several.job import AUTO, EMULATED, MEGATRON, OURS, Job
from lightning_dhellam.bench.shapes import shapes
from lightning_dhellam.pipeline.schedules import Placement, playable

SIDES = (MEGATRON, OURS, EMULATED)


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench several`."""

    cases: tuple[str, ...] = ("a:8:2:1", "b:40:2:1", "a:8:1:2")
    """What to train: shape:layers:tensor:pipeline, or with :context behind, or :context:experts,
    such as m:8:1:1:1:2. Layers that do not fit are left out."""

    sides: tuple[str, ...] = SIDES
    """Who trains it: megatron-core, ours, and emulated, one process that plays a rank of ours. Of a
    pipeline also megatron-core:2 and so on, with as many chunks a stage, interleaved; and
    ours:zb-v and so on: ours by a schedule, or ours:auto, by the best. These share a process."""

    micro_batches: int | tuple[int, ...] = 4
    """Micro-batches to a step: a number, or several such as [4,8,16]."""

    plan: str = "sequential"
    """The plan of ours by schedules. Without one, plans are searched."""

    vocabulary: int = 32000
    """Tokens of the vocabulary."""

    rounds: int = 2
    """Steps of each plan that count, in the search."""

    steps: int = 3
    """Whole steps that are timed."""

    peak_tflops: float = 989.0
    """What a device could compute at most, for the MFU: TFLOP/s."""

    device: str = "cuda"
    """cuda, or cpu for a rehearsal in miniature."""

    budget: float = 540.0
    """Seconds for everything."""

    limit: float = 240.0
    """Seconds for one side of one case."""

    def __post_init__(self) -> None:
        known = (*playable(Placement.folded(2)), AUTO)
        for side in self.sides:
            who, _, how = side.partition(":")
            interleaves = who == MEGATRON and how.isdigit() and int(how) > 1
            if side not in SIDES and not interleaves and not (who == OURS and how in known):
                raise ValueError(
                    f"--sides: '{side}' is not a side: use {', '.join(SIDES)}; or of a pipeline"
                    f" {MEGATRON}:2, and {OURS}:{f' or {OURS}:'.join(known)}"
                )
        if not self.counts or min(self.counts) < 1:
            raise ValueError(
                f"--micro_batches: {self.micro_batches} must be at least 1 micro-batch to a step"
            )
        for job in self.jobs():
            if job.pipeline == 1 and (self.schedules(OURS) or self.schedules(MEGATRON)):
                raise ValueError(
                    f"--cases: '{job.case}' has one stage, and schedules are of several: leave"
                    " them out of --sides, or train in a pipeline, such as a:8:1:2"
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of micro-batches."""
        given = self.micro_batches
        return (given,) if isinstance(given, int) else tuple(given)

    def schedules(self, who: str) -> tuple[str, ...]:
        """The schedules of a side, as `Job` has them, in the order of `sides`."""
        sides = (side.partition(":") for side in self.sides)
        return tuple(how for name, _, how in sides if name == who and how)

    def jobs(self) -> list[Job]:
        """The job of each case, for Megatron-core.

        Raises:
            ValueError: A case is written otherwise.
        """
        return [self._parse(case) for case in self.cases]

    def _parse(self, case: str) -> Job:
        shape, *numbers = case.split(":")
        known = {
            name: found
            for name, found in shapes(rehearse=self.device == "cpu").items()
            if found.context_ranks == 1
        }
        whole = all(number.isdigit() and int(number) for number in numbers)
        if shape not in known or len(numbers) not in (3, 4, 5) or not whole:
            raise ValueError(
                f"--cases: '{case}' is not shape:layers:tensor:pipeline, or with :context or"
                f" :context:experts behind, with a shape of {', '.join(known)}, such as a:8:2:1,"
                " e:8:1:1:2 or m:8:1:1:1:2"
            )
        layers, tensor, pipeline, context, experts = [*map(int, numbers), 1, 1][:5]
        there = known[shape].config.num_experts
        if experts > 1 and (there or 1) % experts:
            raise ValueError(
                f"--cases: '{case}' shares experts among {experts} ranks, but shape {shape} has"
                f" {there or 'none'}: give a divisor, or leave it out"
            )
        return Job(
            MEGATRON, shape, layers, self.vocabulary, self.counts, tensor, pipeline,
            self.device, self.rounds, self.steps, context=context, experts=experts,
            shares=max(map(int, self.schedules(MEGATRON)), default=1),
        )  # fmt: skip
