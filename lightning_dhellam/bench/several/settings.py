"""What `dhellam bench several` is told."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.bench.several.job import EMULATED, MEGATRON, OURS, Job
from lightning_dhellam.bench.shapes import shapes

SIDES = (MEGATRON, OURS, EMULATED)


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench several`."""

    cases: tuple[str, ...] = ("a:8:2:1", "b:40:2:1", "a:8:1:2")
    """What to train: shape:layers:tensor:pipeline, or with :context behind, or :context:experts,
    such as m:8:1:1:1:2. Layers that do not fit are left out."""

    sides: tuple[str, ...] = SIDES
    """Who trains it: Megatron-core, ours, and one process that plays a rank of ours."""

    micro_batches: int = 4
    """Micro-batches to a step."""

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
        unknown = [side for side in self.sides if side not in SIDES]
        if unknown:
            raise ValueError(f"--sides: '{unknown[0]}' is not a side: use {', '.join(SIDES)}")
        self.jobs()

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
            MEGATRON, shape, layers, self.vocabulary, self.micro_batches, tensor, pipeline,
            self.device, self.rounds, self.steps, context=context, experts=experts,
        )  # fmt: skip
