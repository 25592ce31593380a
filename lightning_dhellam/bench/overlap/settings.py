"""What `dhellam bench overlap` is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_dhellam.autosearch.options import MEMORY_SLACK
from lightning_dhellam.bench.overlap.cells import Cell, cells
from lightning_dhellam.bench.plans import PLANS
from lightning_dhellam.bench.shapes import parse_link
from lightning_dhellam.layers.fp8_formats import FORMATS
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.plan.by_layer import AUTO, USUAL
from lightning_dhellam.plan.passes import CHOICES

LINKS = ("copy:110", "16sm:200", "copy:370", "16sm:370", "16sm:100")
"""In the order of their importance."""
CONTEXT_LINKS = ("copy:50", "copy:25", "copy:110", "16sm:50", "16sm:25", "16sm:110")
"""Between ranks that share sequences, likewise."""
EXPERT_LINKS = ("copy:50", "16sm:50", "copy:110", "16sm:110", "copy:25")
"""Between ranks that share experts, likewise."""


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench overlap`."""

    device: str = "cuda"
    """cuda, or cpu to rehearse in miniature."""

    miniature: bool = False
    """Whether to rehearse in miniature on a GPU."""

    links: tuple[str, ...] = LINKS
    """Links over which to train: copy:110 is a copy engine at 110 GB/s, 16sm:200 are 16 SMs."""

    context_links: tuple[str, ...] = CONTEXT_LINKS
    """Links between the ranks that share the sequences of shapes c and d."""

    expert_links: tuple[str, ...] = EXPERT_LINKS
    """Links between the ranks that share the experts of shape m."""

    cluster: str | None = None
    """A cluster whose link is taken instead: a name or a file."""

    plans: tuple[str, ...] = PLANS
    """Plans to compare."""

    cells: tuple[str, ...] | None = None
    """Beginnings of the names of cells to measure, such as a4; all cells if left out."""

    micro_batches: tuple[int, ...] = (4, 8)
    """Micro-batches of the two steps whose difference gives the time of a layer."""

    rounds: int = 4
    """Rounds that count; one more comes before."""

    repeats: int = 7
    """Runs of each operator that count, in the profile."""

    search_time: float | None = None
    """Seconds that each search of a plan may take, about; as long as it takes if left out."""

    memory_slack: float = MEMORY_SLACK
    """Share of the memory of a step that searched plans may need more."""

    budget: float = 1e9
    """Seconds after which no more cells are begun."""

    levers: bool = False
    """Whether to try what may pay beyond order."""

    recompute: tuple[str, ...] = (USUAL,)
    """What backward makes again, each in cells of its own: none, gathers, selective or full, or
    auto:0.5 for what fits into half of the activation memory that none needs."""

    fp8: tuple[str | None, ...] = (None,)
    """How linear layers compute, each in cells of its own: null as they are, current or blockwise
    in 8 bits."""

    fp8_all_gather: tuple[bool, ...] = (False,)
    """Whether what these layers gather travels in 8 bits, each in cells of its own."""

    def __post_init__(self) -> None:
        for name in self.fp8:
            if name is not None and name not in FORMATS:
                known = " or ".join(FORMATS)
                raise ValueError(f"--fp8: '{name}' is not known: use {known}, or null for none")
        if any(self.fp8_all_gather) and not any(self.fp8):
            raise ValueError(
                f"--fp8_all_gather {list(self.fp8_all_gather)} is of layers in 8 bits: give --fp8"
                f" as well, {' or '.join(FORMATS)}"
            )
        unknown = [plan for plan in self.plans if plan not in PLANS]
        if unknown:
            raise ValueError(f"--plans: '{unknown[0]}' is not a plan: use {', '.join(PLANS)}")
        missing = [plan for plan in ("sequential", "megatron") if plan not in self.plans]
        if missing:
            raise ValueError(
                f"--plans: '{missing[0]}' must be among them, others are compared to it"
            )
        for again in self.recompute:
            _check_recompute(again)
        if not self.memory_slack >= 0:
            raise ValueError(f"--memory_slack {self.memory_slack} must be at least 0")
        counts = self.micro_batches
        if len(counts) != 2 or counts[0] == counts[1] or min(counts) < 1:
            raise ValueError(
                f"--micro_batches {list(counts)}: give two different numbers of at least 1"
            )
        if self.search_time is not None and not self.search_time > 0:
            raise ValueError(f"--search_time {self.search_time} must be more than 0 seconds")
        for name in ("rounds", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")

    @property
    def few(self) -> int:
        """Micro-batches of the shorter step."""
        return min(self.micro_batches)

    @property
    def many(self) -> int:
        """Micro-batches of the longer step."""
        return max(self.micro_batches)

    @property
    def rehearses(self) -> bool:
        """Whether shapes are miniatures and links slower."""
        return self.miniature or self.device == "cpu"

    def played_links(self) -> list[Link]:
        """The links that are played, the most important first.

        Raises:
            ValueError: A link is written wrongly, or there is no such cluster.
        """
        if self.cluster is not None:
            return [Cluster.load(self.cluster, "--cluster ").links["tp"]]
        return [parse_link(text) for text in self.links]

    def chosen_cells(self) -> list[Cell]:
        """The cells to measure, the most important first."""
        links = self.played_links()
        plain = self.cluster is None
        found = cells(
            links,
            calibrate=plain,
            levers=self.levers,
            context_links=[parse_link(text) for text in self.context_links if plain],
            expert_links=[parse_link(text) for text in self.expert_links if plain],
        )
        found = [
            replace(cell, recompute=again, fp8=fp8, fp8_all_gather=gathers)
            for cell in found
            for again in self.recompute
            for fp8 in self.fp8
            for gathers in self.fp8_all_gather
            if fp8 or not gathers
        ]
        if self.cells is None:
            return found
        return [cell for cell in found if any(map(cell.name.startswith, self.cells))]


def _check_recompute(text: str) -> None:
    auto, _, share = text.partition(":")
    try:
        known = text in CHOICES or (auto == AUTO and 0 < float(share) <= 1)
    except ValueError:
        known = False
    if not known:
        raise ValueError(
            f"--recompute: '{text}' is not a choice: use {', '.join(CHOICES)}, or {AUTO}:0.5 for"
            " half of the activation memory"
        )
