"""What `dhellam bench several` is told."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.bench.megatron_model import has_transformer_engine
from lightning_dhellam.bench.plans import BUILT_IN
from lightning_dhellam.bench.plans import PLANS as KNOWN
from lightning_dhellam.bench.several.job import AUTO, EMULATED, MEGATRON, OURS, TP_OVERLAP, Job
from lightning_dhellam.bench.shapes import shapes
from lightning_dhellam.pipeline.schedules import Placement, playable

SIDES = (MEGATRON, OURS, EMULATED)
PLANS = (*BUILT_IN, AUTO)


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench several`."""

    cases: tuple[str, ...] = ("a:8:2:1", "b:40:2:1", "a:8:1:2")
    """What to train: shape:layers:tensor:pipeline, and behind it :context, :context:experts or
    :context:experts:replicas, such as m:8:1:1:1:2. Layers that do not fit are left out."""

    sides: tuple[str, ...] = SIDES
    """Who trains it: megatron-core, ours, and emulated, one process that plays a rank of ours;
    megatron-core:tp-overlap, whose tensor-parallel communication transformer-engine overlaps. Of a
    pipeline also megatron-core:2 and so on, with as many chunks a stage, interleaved; and
    ours:zb-v and so on: ours by a schedule, or ours:auto, by the best. All of ours share processes,
    one profile and a search."""

    micro_batches: int | tuple[int, ...] = 4
    """Micro-batches to a step: a number, or several such as [4,8,16]."""

    plans: tuple[str, ...] = PLANS
    """Plans of ours to compare."""

    plan: str = "sequential"
    """The plan of ours by schedules, if no plans are compared; else it is the fastest of those."""

    vocabulary: int = 32000
    """Tokens of the vocabulary."""

    repeats: int = 7
    """Runs of each operator that count, in the profile of ours."""

    search_time: float | None = None
    """Seconds that the search of each plan of ours may take, about; as long as it takes if left
    out."""

    steps: int = 3
    """Whole steps that are timed of each row; fewer where there are more micro-batches to one."""

    peak_tflops: float = 989.0
    """What a device could compute at most, for the MFU: TFLOP/s."""

    device: str = "cuda"
    """cuda, or cpu for a rehearsal in miniature."""

    budget: float = 540.0
    """Seconds for everything."""

    limit: float = 240.0
    """Seconds for one side of one case, after which the rows that it lacks are named."""

    def __post_init__(self) -> None:
        known = (*playable(Placement.folded(2)), AUTO)
        for side in self.sides:
            who, _, how = side.partition(":")
            interleaves = who == MEGATRON and how.isdigit() and int(how) > 1
            overlaps = who == MEGATRON and how == TP_OVERLAP
            schedule = interleaves or (who == OURS and how in known)
            if side not in SIDES and not overlaps and not schedule:
                raise ValueError(
                    f"--sides: '{side}' is not a side: use {', '.join(SIDES)} or"
                    f" {MEGATRON}:{TP_OVERLAP}; or of a pipeline {MEGATRON}:2, and"
                    f" {OURS}:{f' or {OURS}:'.join(known)}"
                )
        unknown = [plan for plan in self.plans if plan not in KNOWN]
        if unknown or not self.plans:
            raise ValueError(
                f"--plans: {repr(unknown[0]) + ' is not a plan' if unknown else 'there are none'}:"
                f" use {', '.join(KNOWN)}"
            )
        if self.search_time is not None and not self.search_time > 0:
            raise ValueError(f"--search_time {self.search_time} must be more than 0 seconds")
        for name in ("repeats", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
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
            if self.overlaps:
                self._check_overlap(job)

    def _check_overlap(self, job: Job) -> None:
        side = f"--sides: '{MEGATRON}:{TP_OVERLAP}'"
        if job.tensor == 1 or job.ranks > job.tensor:
            raise ValueError(
                f"{side} is measured where there is tensor parallelism alone, which case"
                f" '{job.case}' is not: give one such as a:8:2:1, or leave the side out"
            )
        if job.sparse:
            raise ValueError(
                f"{side} is measured of dense layers, but shape {job.shape} has experts: give one"
                " such as a:8:2:1, or leave the side out"
            )
        if self.device != "cuda":
            raise ValueError(
                f"{side} is transformer-engine's, which computes on GPUs alone: leave it out of"
                f" --sides with --device {self.device}"
            )
        if not has_transformer_engine():
            raise ValueError(
                f"{side} overlaps by transformer-engine, which is not installed: pip install"
                " --no-build-isolation 'transformer-engine[pytorch]', or leave the side out"
            )

    @property
    def overlaps(self) -> bool:
        """Whether Megatron-core's own overlap of tensor-parallel communication is a side."""
        return f"{MEGATRON}:{TP_OVERLAP}" in self.sides

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of micro-batches."""
        given = self.micro_batches
        return (given,) if isinstance(given, int) else tuple(given)

    def schedules(self, who: str) -> tuple[str, ...]:
        """The schedules of a side, as `Job` has them, in the order of `sides`."""
        sides = (side.partition(":") for side in self.sides)
        return tuple(how for name, _, how in sides if name == who and how not in ("", TP_OVERLAP))

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
        if shape not in known or len(numbers) not in (3, 4, 5, 6) or not whole:
            raise ValueError(
                f"--cases: '{case}' is not shape:layers:tensor:pipeline, or with :context,"
                " :context:experts or :context:experts:replicas behind, with a shape of"
                f" {', '.join(known)}, such as a:8:2:1, e:8:1:1:2 or m:8:1:1:1:2"
            )
        layers, tensor, pipeline, context, experts, replicas = [*map(int, numbers), 1, 1, 1][:6]
        there = known[shape].config.num_experts
        if experts > 1 and (there or 1) % experts:
            raise ValueError(
                f"--cases: '{case}' shares experts among {experts} ranks, but shape {shape} has"
                f" {there or 'none'}: give a divisor, or leave it out"
            )
        return Job(
            MEGATRON, shape, layers, self.vocabulary, self.counts, tensor, pipeline,
            self.device, self.steps, self.repeats, self.search_time,
            context=context, experts=experts, replicas=replicas, plan=self.plan,
            shares=max(map(int, self.schedules(MEGATRON)), default=1),
        )  # fmt: skip
