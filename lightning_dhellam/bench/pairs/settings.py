"""What `dhellam bench pairs` is told."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.bench.shapes import SLOWER, Shape, parse_link, shapes
from lightning_dhellam.parallel import Cluster


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench pairs`."""

    device: str = "cuda"
    """cuda, or cpu to rehearse in miniature."""

    shape: str = "a"
    """a for layers of Llama-3-70B width, b for Qwen3-14B width."""

    link: str = "16sm:370"
    """The link to emulate: copy:110 is a copy engine at 110 GB/s, 16sm:200 are 16 SMs."""

    cluster: str | None = None
    """A cluster whose link is taken instead: a name or a file."""

    repeats: int = 7
    """Runs of each pair that count."""

    def __post_init__(self) -> None:
        known = shapes(self.rehearses)
        if self.shape not in known:
            raise ValueError(f"--shape '{self.shape}' is not a shape: use {', '.join(known)}")
        if self.repeats < 1:
            raise ValueError(f"--repeats {self.repeats} must be at least 1")

    @property
    def rehearses(self) -> bool:
        """Whether the shape is a miniature and the link slower."""
        return self.device == "cpu"

    def trained_shape(self) -> Shape:
        """The shape whose layer is measured."""
        return shapes(self.rehearses)[self.shape]

    def played_cluster(self) -> Cluster:
        """The cluster of which a rank is played.

        Raises:
            ValueError: The link is written wrongly, or there is no such cluster.
        """
        if self.cluster is not None:
            return Cluster.load(self.cluster)
        link = parse_link(self.link)
        ranks = self.trained_shape().ranks
        return Cluster(ranks, {"tp": link.slower(SLOWER) if self.rehearses else link})
