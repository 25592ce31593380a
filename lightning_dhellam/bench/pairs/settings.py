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
    """a for layers of Llama-3-70B width, b for Qwen3-14B width. Ranks share the sequences of c,
    whose heads have keys of their own, and of d, which is a otherwise."""

    link: str = "16sm:370"
    """The link to emulate: copy:110 is a copy engine at 110 GB/s, 16sm:200 are 16 SMs."""

    context_link: str = "16sm:50"
    """The link between ranks that share the sequences of c and d."""

    cluster: str | None = None
    """A cluster whose links are taken instead: a name or a file."""

    repeats: int = 7
    """Runs of each pair that count."""

    def __post_init__(self) -> None:
        known = self._shapes()
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
        return self._shapes()[self.shape]

    def _shapes(self) -> dict[str, Shape]:
        known = shapes(self.rehearses)
        return {name: shape for name, shape in known.items() if shape.expert_ranks == 1}

    def played_cluster(self) -> Cluster:
        """The cluster of which a rank is played.

        Raises:
            ValueError: A link is written wrongly, or there is no such cluster, or it has no link
                for ranks that share sequences.
        """
        shape = self.trained_shape()
        if self.cluster is not None:
            cluster = Cluster.load(self.cluster, "--cluster ")
            unknown = cluster.networks is None and "cp" not in cluster.links
            if shape.context_ranks > 1 and unknown:
                raise ValueError(
                    f"--cluster {self.cluster} has no link 'cp', over which the ranks of shape"
                    f" {self.shape} share sequences: add one under `links`, or use --context_link"
                )
            return cluster
        slower = SLOWER if self.rehearses else 1
        links = {"tp": parse_link(self.link).slower(slower)}
        if shape.context_ranks > 1:
            links["cp"] = parse_link(self.context_link).slower(slower)
        return Cluster(shape.ranks * shape.context_ranks, links)
