"""What the processes of `dhellam bench several` are told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_dhellam.bench.shapes import Shape, shapes
from lightning_dhellam.models import ModelConfig, parameter_count

OURS, MEGATRON, EMULATED, SCHEDULED = "ours", "megatron-core", "emulated", "scheduled"
AUTO = "auto"
JOB, RESULT = "job.json", "result.json"
"""Files of a job's folder: what its processes are told, and what the first of them writes."""

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
        side: Who trains: `ours`, `megatron-core`, or `scheduled`, which is ours by schedules.
        shape: The letter of width and sequences, as in `dhellam bench overlap`.
        layers: Layers of the model; as many as fit are trained, if these do not.
        vocabulary: Tokens of the model's vocabulary.
        counts: Micro-batches of a step, one number after the other. Where plans are searched, one.
        tensor: The tensor-parallel size.
        pipeline: The pipeline-parallel size.
        device: `cuda`, or `cpu` for a rehearsal in miniature.
        rounds: Steps that our search measures each plan on.
        steps: Steps that are timed after the search, or of Megatron-core.
        transformer_engine: Whether Megatron-core's side uses transformer-engine's modules.
        context: The context-parallel size.
        experts: The expert-parallel size, of as many data-parallel ranks.
        plan: The plan of our side: `auto`, or a plan file to try beside the built-in ones.
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
    rounds: int
    steps: int
    transformer_engine: bool = False
    context: int = 1
    experts: int = 1
    plan: str = "auto"
    schedules: tuple[str, ...] = ()
    shares: int = 1
    emulate: Mapping[str, float] | None = None

    @property
    def case(self) -> str:
        """What is trained, and how it is laid out."""
        shared = f" cp{self.context}" if self.context > 1 else ""
        spread = f" ep{self.experts}" if self.experts > 1 else ""
        return f"{self.shape}{self.layers} tp{self.tensor} pp{self.pipeline}{shared}{spread}"

    @property
    def processes(self) -> int:
        """The processes that run it."""
        ranks = self.tensor * self.pipeline * self.context * self.experts
        return 1 if self.emulate else ranks

    @classmethod
    def load(cls, path: Path) -> Job:
        """The job that was saved at `path`."""
        fields = json.loads(path.read_text())
        lists = {name: tuple(fields[name]) for name in ("counts", "schedules")}
        return cls(**{**fields, **lists})

    def save(self, path: Path) -> None:
        """Write the job for its processes."""
        path.write_text(json.dumps(asdict(self)))

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self._shape.length

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch."""
        return self._shape.micro_batch

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
        size = (count * self.micro_batch * self.experts, self.length + 1)
        tokens = torch.randint(0, config.vocab_size, size, generator=generator)
        return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def memory_of(device: torch.device) -> float:
    """The bytes of a GPU's memory; of a CPU, what a miniature may use."""
    if device.type != "cuda":
        return float(1 << 30)
    return float(torch.cuda.get_device_properties(device).total_memory)
