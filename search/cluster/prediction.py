"""What is predicted of a step on a cluster, as plain values: to print, to compare and to draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_dhellam.search.model import Interval


@dataclass(frozen=True)
class Choice:
    """How a model is spread over a cluster, and what its steps do.

    Attributes:
        tp: ranks that share each layer.
        cp: ranks that share each sequence.
        ep: ranks that share the experts.
        etp: ranks that share each expert.
        pp: pipeline stages.
        dp: ranks that train on other samples.
        micro_batch_size: samples that go through the layers together.
        micro_batches: of a step, on each rank.
        schedule: order of the pipeline's works.
        recompute: what backward makes again.
        plan: order of the operators.
        fp8: how linear layers compute in 8 bits; empty where they do not.
        offload: what waits in host memory for backward; empty where nothing does.
    """

    tp: int
    cp: int
    ep: int
    etp: int
    pp: int
    dp: int
    micro_batch_size: int
    micro_batches: int
    schedule: str = "fold"
    recompute: str = "gathers"
    plan: str = "interleaved"
    fp8: str = ""
    offload: str = ""

    @property
    def ranks(self) -> int:
        """How many ranks the step has."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.dp * self.micro_batch_size * self.micro_batches

    def __str__(self) -> str:
        sizes = ("tp", "cp", "ep", "etp", "pp", "dp")
        # Experts are split as layers are, unless it is said.
        usual = {"etp": self.tp}
        shown = [
            f"{name} {getattr(self, name)}"
            for name in sizes
            if getattr(self, name) != usual.get(name, 1)
        ]
        shown.append(f"{self.micro_batches} × {self.micro_batch_size}")
        shown += [self.schedule] if self.pp > 1 else []
        eight = [f"fp8 {self.fp8}"] if self.fp8 else []
        away = [f"offload {self.offload}"] if self.offload else []
        return ", ".join([*shown, self.recompute, *away, *eight, self.plan])


@dataclass(frozen=True)
class LaneUse:
    """A lane in a step, on the rank that is busiest.

    Attributes:
        busy: seconds in which it works.
        exposed: seconds of these in which compute idles; none of compute's own.
        level: the network that it uses, `inside` of a node or `between` nodes; empty for compute.
        ranks: how many communicate on it.
    """

    busy: float
    exposed: float
    level: str = ""
    ranks: int = 1


@dataclass(frozen=True)
class VisitSpan:
    """A visit on the timeline of a stage, such as `0F3+3B0`, in seconds from the step's start."""

    works: str
    start: float
    end: float


@dataclass(frozen=True)
class StagePrediction:
    """A pipeline stage, whose ranks are alike.

    The seconds from `compute` to `optimizer` add up to those of the step.

    Attributes:
        stage: its number.
        ranks: how many it has.
        compute: seconds in which compute works.
        exposed: seconds in which it waits for communication of its own layers.
        transfer: seconds in which it waits for what another stage sends.
        bubble: seconds in which there is nothing to do.
        reduction: seconds of the reduction of gradients that nothing hides.
        optimizer: seconds from the last gradient to the new weights.
        memory: bytes that a rank takes, by what for; empty where they were not asked for.
        visits: what it does when; empty without a pipeline.
    """

    stage: int
    ranks: int
    compute: float
    exposed: float
    transfer: float
    bubble: float
    reduction: float
    optimizer: float
    memory: Mapping[str, int] = field(default_factory=dict)
    visits: tuple[VisitSpan, ...] = ()

    @property
    def bytes(self) -> int:
        """All that a rank takes of its memory."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Prediction:
    """A step of a model on a cluster.

    Attributes:
        model: what the user calls it.
        cluster: what the user calls it.
        device: what each rank computes on.
        profile: the device that operators were measured on; empty where all are derived.
        choice: how the model is spread, and what its steps do.
        length: tokens of a sequence.
        seconds: of a step, optimizer included.
        low: seconds of a step if all that is uncertain turns out well.
        high: seconds of a step if it turns out badly.
        tokens_per_second: of all ranks together.
        mfu: share of what the devices could compute, attention causal-halved.
        lanes: use of each lane, by its name.
        stages: of the pipeline; one without.
        memory_limit: bytes of a device.
        intervals: operators on the lanes of one rank for a pair of layers in the middle of a step,
            its neighbours included, from 0 seconds on.
        plans: the plans as tables, by the pair of layers, such as `transformer|transformer`.
        origins: seconds of operators of a step by where their times come from: `measured`, `scaled`
            (from another size of the same operator), `derived` (from data sheets), `modelled`
            (communication by bytes and level).
        notes: what was assumed, a sentence each.
        plan: names of the plans that were played, the fastest of those that there were.
    """

    model: str
    cluster: str
    device: str
    profile: str
    choice: Choice
    length: int
    seconds: float
    low: float
    high: float
    tokens_per_second: float
    mfu: float
    lanes: Mapping[str, LaneUse]
    stages: tuple[StagePrediction, ...]
    memory_limit: int
    intervals: tuple[Interval, ...] = ()
    plans: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    plan: str = ""

    @property
    def bubble(self) -> float:
        """Share of the step in which stages have nothing to do, their mean."""
        return sum(stage.bubble for stage in self.stages) / len(self.stages) / self.seconds

    @property
    def bytes(self) -> int:
        """Most memory that a rank takes."""
        return max(stage.bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether all ranks have the memory that they take."""
        return self.bytes <= self.memory_limit

    def as_values(self) -> dict[str, Any]:
        """All of it for JSON, with what follows from it."""
        derived = {"bubble": self.bubble, "bytes": self.bytes, "fits": self.fits}
        return {**asdict(self), **derived}


@dataclass(frozen=True)
class Candidate:
    """A choice among others.

    Attributes:
        prediction: of its step.
        reason: why it is not the best one; empty for the best.
    """

    prediction: Prediction
    reason: str


@dataclass(frozen=True)
class Advice:
    """What was found for a model, a cluster and a global batch.

    Attributes:
        candidates: the best ones, the best first.
        looked_at: how many choices there are.
        played: of how many a step was played.
        refused: why the others were not, and how many each reason holds for.
        seconds: that the search has taken.
    """

    candidates: tuple[Candidate, ...]
    looked_at: int
    played: int
    refused: Mapping[str, int]
    seconds: float

    @property
    def best(self) -> Prediction:
        """The first choice."""
        return self.candidates[0].prediction

    def as_values(self) -> dict[str, Any]:
        """All of it for JSON."""
        rows = [{**one.prediction.as_values(), "reason": one.reason} for one in self.candidates]
        return {**asdict(self), "candidates": rows}
