"""What `dhellam bench throughput` is told, and what it tells each of its processes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.layers.fp8_formats import FORMATS
from lightning_dhellam.models import LoRA, ModelConfig, preset, training_flops_per_token
from lightning_dhellam.plan.by_layer import AUTO
from lightning_dhellam.plan.passes import CHOICES

OURS, EAGER, COMPILED = "ours", "eager", "compiled"
SIDES = (OURS, EAGER, COMPILED)
IN_8_BITS = tuple(f"{OURS}:{name}" for name in FORMATS)
"""Sides of ours with `fp8=`, which are not measured unless they are asked for."""
ENGINE = "transformer-engine"
ENGINES = tuple(f"{ENGINE}:{name}" for name in FORMATS)
"""Sides of Hugging Face's model with transformer-engine's layers, likewise."""
CASES = (
    "llama-3-8b:8:32000:8192:4",
    "llama-3-8b:8:128256:8192:4",
    "llama-3.2-3b:28:128256:8192:4",
    "llama-3-8b:8:32000:32768:2",
    "llama-3-8b:32:128256:4096:8:lora16",
    "llama-3-8b:8:32000:32768:2:auto",
)
_FORM = "preset:layers:vocabulary:sequence:micro-batches[:loraRANK][:RECOMPUTE]"


def is_ours(side: str) -> bool:
    """Whether a side is ours, in whatever format."""
    return side.partition(":")[0] == OURS


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench throughput`."""

    cases: tuple[str, ...] = CASES
    """What to train, the most important first: preset:layers:vocabulary:sequence:micro-batches, and
    :lora16 behind it for adapters of rank 16 beside frozen weights, on their side by peft; :auto,
    :full or :selective for what backward makes again, on their side gradient checkpointing."""

    sides: tuple[str, ...] = SIDES
    """Who trains it: ours, and Hugging Face's model eager and compiled. Also ours:current and
    ours:blockwise, with linear layers in 8 bits, and transformer-engine:current and
    transformer-engine:blockwise, Hugging Face's model with layers of transformer-engine's."""

    steps: int = 6
    """Optimizer steps that are timed."""

    warm_up: int = 3
    """Optimizer steps before those."""

    plan: str = "interleaved"
    """The plan of our side: a name or a plan file."""

    operators: bool = True
    """Whether the operators of our sides are timed as well, in the first case."""

    peak_tflops: float = 989.0
    """What the device could compute at most, for the MFU: TFLOP/s."""

    device: str = "cuda"
    """cuda, or cpu for a rehearsal."""

    budget: float = 1800.0
    """Seconds for everything."""

    limit: float = 240.0
    """Seconds for one side of one case."""

    def __post_init__(self) -> None:
        known = (*SIDES, *IN_8_BITS, *ENGINES)
        unknown = [side for side in self.sides if side not in known]
        if unknown:
            raise ValueError(f"--sides: '{unknown[0]}' is not a side: use {', '.join(known)}")
        for case in self.cases:
            Case.parse(case)

    def jobs(self) -> list[Job]:
        """Every side of every case, the most important first.

        Compiling takes longest and has lost so far: it waits for the next case's other sides.
        """
        pairs = [(case, side) for case in self.cases for side in self.sides]
        pairs.sort(key=lambda job: self.cases.index(job[0]) + 1.5 * (job[1] == COMPILED))
        return [
            Job(
                case, side, self.device, self.plan, self.warm_up, self.steps,
                operators=self.operators and is_ours(side) and case == self.cases[0],
            )
            for case, side in pairs
        ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, and what a step trains it on.

    Attributes:
        config: The model.
        length: Tokens of a sequence.
        micro_batches: Micro-batches of one sample each to an optimizer step.
        lora: Adapters, if they alone are trained.
        recompute: What our side's backward makes again, where theirs has gradient checkpointing;
            None for what is usual, which is none on their side.
    """

    config: ModelConfig
    length: int
    micro_batches: int
    lora: LoRA | None = None
    recompute: str | None = None

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that is written as `preset:layers:vocabulary:sequence:micro-batches`,
        with `:lora16`, `:auto` or both behind it.

        Raises:
            ValueError: It is written otherwise, or there is no such preset.
        """
        name, *numbers = text.split(":")
        recompute = numbers.pop() if numbers and numbers[-1] in (AUTO, *CHOICES) else None
        rank = numbers.pop().removeprefix("lora") if len(numbers) == 5 else ""
        if len(numbers) != 4 or not all(part.isdigit() for part in (*numbers, rank or "0")):
            raise ValueError(f"--cases: '{text}' is not {_FORM}, such as llama-3-8b:8:32000:8192:4")
        layers, vocabulary, length, micro_batches = map(int, numbers)
        config = preset(name, num_layers=layers, vocab_size=vocabulary, max_sequence_length=length)
        lora = LoRA(int(rank), 2.0 * int(rank)) if rank else None
        return cls(config, length, micro_batches, lora, recompute)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward for a token, with attention causal-halved."""
        frozen = self.lora is not None
        return training_flops_per_token(self.config, self.length, frozen=frozen)


@dataclass(frozen=True)
class Job:
    """One side of one case, as its process is told.

    Attributes:
        case: What is trained, as `Case.parse` reads it.
        side: Who trains: one of `SIDES`, `IN_8_BITS` or `ENGINES`.
        device: `cuda`, or `cpu` for a rehearsal.
        plan: The plan of our side.
        warm_up: Optimizer steps before those that are timed.
        steps: Optimizer steps that are timed.
        operators: Whether to time our side's operators after the steps.
    """

    case: str
    side: str
    device: str
    plan: str
    warm_up: int
    steps: int
    operators: bool = False
