"""The runs whose memory `dhellam bench memory` predicts and measures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_dhellam.memory import Run
from lightning_dhellam.models import ModelConfig, preset
from lightning_dhellam.parallel import Cluster, Topology
from lightning_dhellam.plan.by_layer import AUTO, ByLayer
from lightning_dhellam.plan.passes import Recompute

PRECISION = "bf16-mixed"
ALONE = Topology()


@dataclass(frozen=True)
class Case:
    """A run, of which one rank is measured.

    Attributes:
        config: of the model.
        length: tokens of a sequence.
        samples: of the rank's batch in a step.
        micro_batch_size: samples that go through the layers together.
        recompute: what backward makes again.
        room: with `auto` how much of what `none` takes beyond `full` there is room for.
        schedule: order of the pipeline's works.
        topology: which rank of how many is measured.
    """

    config: ModelConfig
    length: int
    samples: int
    micro_batch_size: int = 1
    recompute: str = "gathers"
    room: float = 0.5
    schedule: str = "fold"
    topology: Topology = ALONE

    @property
    def cluster(self) -> Cluster:
        """The cluster of which the rank is played: between its ranks nothing takes any time."""
        return Cluster(self.topology.world_size, {}, rank=self.topology.rank)

    @property
    def means_something(self) -> bool:
        """Whether there are no other ranks, whose numbers would be missing."""
        return self.topology.world_size == 1

    def run(self, recompute: Recompute | ByLayer) -> Run:
        """What its memory is predicted from, with another choice of what is made again."""
        return Run(
            self.config,
            self.topology,
            self.samples,
            self.length,
            micro_batch_size=self.micro_batch_size,
            precision=PRECISION,
            recompute=recompute,
            schedule=self.schedule,
        )


def cases(rehearses: bool) -> dict[str, Case]:
    """Ten runs by name; to rehearse with, miniatures of them."""
    dense, wide, mixture = _miniatures() if rehearses else _published()
    length, tensor = (64, 4) if rehearses else (8192, 8)
    plain = Case(dense, length, 4)
    short = replace(dense, num_layers=2)
    long = replace(short, max_sequence_length=4 * length)
    larger = replace(short, vocab_size=4 * dense.vocab_size)
    staged = Case(replace(dense, num_layers=8), length // 2, 12)
    first, last = (Topology(world_size=4, rank=rank, pp_size=4) for rank in (0, 3))
    return {
        "none": replace(plain, recompute="none"),
        "selective": replace(plain, recompute="selective"),
        "full": replace(plain, recompute="full"),
        "auto": replace(plain, recompute=AUTO),
        "long sequence": Case(long, 4 * length, 3, recompute="full"),
        "large head": Case(larger, length, 3),
        "experts": Case(mixture, length // 2, 6, 2),
        f"tp {tensor}": Case(
            wide,
            length,
            4,
            recompute="selective",
            topology=Topology(world_size=tensor, tp_size=tensor),
        ),
        "first of 4 stages": replace(staged, topology=first),
        "last of 4 stages": replace(staged, recompute="full", schedule="dualpipe-v", topology=last),
    }


def _miniatures() -> tuple[ModelConfig, ModelConfig, ModelConfig]:
    tiny = {"vocab_size": 256, "max_sequence_length": 256}
    return (
        preset("llama-tiny", hidden_size=64, ffn_hidden_size=128, **tiny),
        preset("llama-tiny", hidden_size=128, ffn_hidden_size=256, **tiny),
        preset("moe-tiny", num_layers=1, **tiny),
    )


def _published() -> tuple[ModelConfig, ModelConfig, ModelConfig]:
    """Layers as wide as those of models that are known, and few of them."""
    sizes = {"vocab_size": 32000, "max_sequence_length": 8192}
    return (
        preset("llama-3-8b", num_layers=4, **sizes),
        preset("llama-3-70b", num_layers=8, **sizes),
        preset("phi-3.5-moe", num_layers=1),
    )
