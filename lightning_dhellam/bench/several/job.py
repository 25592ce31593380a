"""What the processes of `dhellam bench several` are told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_dhellam.bench.shapes import Shape, shapes
from lightning_dhellam.files import save_text
from lightning_dhellam.models import ModelConfig, parameter_count

OURS, MEGATRON, EMULATED = "ours", "megatron-core", "emulated"
AUTO = "auto"
JOB, RESULT, LOG, PLAN = "job.json", "result.json", "log.txt", "plan.json"
"""Files of a job's folder: what its processes are told, what the first of them writes after each
row, what all of them print, and the fastest plan."""
TP_OVERLAP = "tp-overlap"
"""Megatron-core's step with its own overlap of tensor-parallel communication."""

_STATE = 18
"""Bytes for each parameter: weight, fp32 gradient, master weight and two moments of AdamW."""
_STREAMS = 8
"""Hidden states of a token that a layer keeps beside those of the MLP, with some room."""
_ROOM = 0.88
"""Share of the device's memory that may be filled."""


@dataclass(frozen=True)
class Job:
    """One side of one case, for all of its processes.

    Attributes:
        side: Who trains: `ours` or `megatron-core`.
        shape: The letter of width and sequences, as in `dhellam bench overlap`.
        layers: Layers of the model; as many as fit are trained, if these do not.
        vocabulary: Tokens of the model's vocabulary.
        counts: Micro-batches of a step, one number after the other.
        tensor: The tensor-parallel size.
        pipeline: The pipeline-parallel size.
        device: `cuda`, or `cpu` for a rehearsal in miniature.
        steps: Steps that are timed of each row.
        repeats: Runs of each operator that count, in the profile.
        search_time: Seconds that the search of a plan may take; None for as long as it takes.
        transformer_engine: Whether Megatron-core's side uses transformer-engine's modules.
        tp_overlap: Whether these overlap tensor-parallel communication.
        context: The context-parallel size.
        experts: The expert-parallel size, of as many data-parallel ranks.
        replicas: How many times so many ranks train samples of their own.
        plans: Plans of our side, one after the other: names, or a plan file.
        plan: The plan of our side by schedules, if it has no `plans`.
        schedules: Of a pipeline, one after the other: names of ours; of Megatron-core's side how
            many chunks each stage has.
        shares: Chunks of a stage that its layers can be shared out to, whoever trains them.
        emulate: The link of a cluster that one process of our side plays a rank of, by the fields
            of `Link`.
    """

    side: str
    shape: str
    layers: int
    vocabulary: int
    counts: tuple[int, ...]
    tensor: int
    pipeline: int
    device: str
    steps: int
    repeats: int = 7
    search_time: float | None = None
    transformer_engine: bool = False
    tp_overlap: bool = False
    context: int = 1
    experts: int = 1
    replicas: int = 1
    plans: tuple[str, ...] = ()
    plan: str = "sequential"
    schedules: tuple[str, ...] = ()
    shares: int = 1
    emulate: Mapping[str, float] | None = None

    @property
    def case(self) -> str:
        """What is trained, and how it is laid out."""
        shared = f" cp{self.context}" if self.context > 1 else ""
        spread = f" ep{self.experts}" if self.experts > 1 else ""
        again = f" dp{self.replicas}" if self.replicas > 1 else ""
        sizes = f"tp{self.tensor} pp{self.pipeline}{shared}{spread}{again}"
        return f"{self.shape}{self.layers} {sizes}"

    @property
    def ranks(self) -> int:
        """The ranks that share the model, and the samples of a step."""
        return self.tensor * self.pipeline * self.context * self.samples

    @property
    def samples(self) -> int:
        """How many ranks have samples of their own."""
        return self.experts * self.replicas

    @property
    def processes(self) -> int:
        """The processes that run it."""
        return 1 if self.emulate else self.ranks

    @classmethod
    def load(cls, path: Path) -> Job:
        """The job that was saved at `path`."""
        fields = json.loads(path.read_text())
        lists = {name: tuple(fields[name]) for name in ("counts", "plans", "schedules")}
        return cls(**{**fields, **lists})

    def save(self, path: Path) -> None:
        """Write the job for its processes, which may wait for it."""
        save_text(path, json.dumps(asdict(self)))

    @property
    def rows(self) -> list[tuple[int, str]]:
        """The rows that it is to have: micro-batches, and a name as in `sides` and `plans`."""
        named = [side if how == "1" else f"{side}:{how}" for side, how in self._ways]
        names = [*self.plans, *named]
        if self.side == MEGATRON:  # which has a model for each
            return [(count, name) for name in names for count in self.counts]
        return [(count, name) for count in self.counts for name in names]

    @property
    def _ways(self) -> list[tuple[str, str]]:
        """Who trains by which schedule, `auto` as the last."""
        usual = ("1",) if self.side == MEGATRON else ()
        return [(self.side, how) for how in sorted(self.schedules or usual, key=AUTO.__eq__)]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self._shape.length

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch."""
        return self._shape.micro_batch

    @property
    def sparse(self) -> bool:
        """Whether its layers have experts."""
        return self._shape.config.num_experts is not None

    @property
    def _shape(self) -> Shape:
        return shapes(rehearse=self.device == "cpu")[self.shape]

    def config(self, memory: float) -> ModelConfig:
        """The model, with no more layers than fit into `memory` bytes with all that they need."""
        config = replace(self._shape.config, vocab_size=self.vocabulary)
        layers = min(self.layers, self._fitting(config, memory))
        # As Megatron shares them out; all its schedules train the same model.
        shares = self.pipeline * self.shares
        return replace(config, num_layers=max(layers - layers % shares, shares))

    def _fitting(self, config: ModelConfig, memory: float) -> int:
        held = self._held(config)
        one, two = (parameter_count(replace(held, num_layers=count)) for count in (1, 2))
        layer, ends = two - one, 2 * one - two
        tokens = self.length * self.micro_batch / self.context
        rows = config.experts_per_token if config.num_experts else 0
        kept = 3 * (rows or 1) * config.expert_width + (_STREAMS + rows) * config.hidden_size
        # A pipeline shares weights out, but each stage holds activations of as many layers.
        saved = 2 * kept * tokens / self.tensor
        logits = 4 * self.vocabulary * tokens / self.tensor
        room = _ROOM * memory - logits - _STATE * ends / self.tensor
        return int(room / (_STATE * layer / self.tensor / self.pipeline + saved))

    def _held(self, config: ModelConfig) -> ModelConfig:
        """The model with the experts of one rank, but no fewer than a token goes to."""
        if config.num_experts is None:
            return config
        held = max(config.num_experts // self.experts, config.experts_per_token)
        return replace(config, num_experts=held)

    def steps_of(self, count: int) -> int:
        """Steps of `count` micro-batches to time: as many micro-batches as of the shortest ones."""
        return max(1, round(self.steps * min(self.counts) / count))

    def batch(self, config: ModelConfig, count: int) -> dict[str, Tensor]:
        """Tokens and labels [B, S] of every step of `count` micro-batches, the same for all sides
        and ranks.

        Of data-parallel ranks each takes every n-th row.
        """
        generator = torch.Generator().manual_seed(5)
        size = (count * self.micro_batch * self.samples, self.length + 1)
        tokens = torch.randint(0, config.vocab_size, size, generator=generator)
        return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def memory_of(device: torch.device) -> float:
    """The bytes of a GPU's memory; of a CPU, what a miniature may use."""
    if device.type != "cuda":
        return float(1 << 30)
    return float(torch.cuda.get_device_properties(device).total_memory)
