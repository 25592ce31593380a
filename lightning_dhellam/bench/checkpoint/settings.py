"""What `dhellam bench checkpoint` is told."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.bench.throughput.settings import Case
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import Topology

BANDWIDTH, STEPS = PARTS = ("bandwidth", "steps")


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench checkpoint`."""

    processes: int = 8
    """Processes of the run, on the CPUs of this host."""

    tensor_parallel_size: int = 2
    """Processes that share each layer."""

    pipeline_parallel_size: int = 2
    """Stages; data parallelism takes what is left."""

    layers: int = 8
    """Layers of the model."""

    hidden: int = 512
    """Hidden size of the model."""

    vocabulary: int = 32000
    """Words of the model."""

    repeats: int = 5
    """Times that each way saves and loads, in turn; the median counts."""

    parts: tuple[str, ...] = PARTS
    """What is measured: bandwidth of processes, and steps of a training that saves."""

    case: str = "llama-3.2-3b:16:128256:4096:8"
    """What is trained: preset:layers:vocabulary:sequence:micro-batches. That of the default has 2.0
    billion parameters, and its checkpoints 28 GB, of which two are written."""

    steps: int = 2
    """Steps that nothing disturbs before each save; the median counts."""

    device: str = "cuda"
    """That trains: cuda, or cpu for a rehearsal."""

    def __post_init__(self) -> None:
        for name in ("processes", "layers", "hidden", "vocabulary", "repeats", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"--parts: '{unknown[0]}' is not a part: use {', '.join(PARTS)}")
        if STEPS in self.parts:
            Case.parse(self.case)
        self.config.validate(self.tensor_parallel_size)
        Topology(
            world_size=self.processes,
            tp_size=self.tensor_parallel_size,
            pp_size=self.pipeline_parallel_size,
            etp_size=self.tensor_parallel_size,
        )

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.hidden * 3,
            num_attention_heads=8,
            num_query_groups=8,
            vocab_size=self.vocabulary,
            max_sequence_length=16,
        )
