"""Schedules of a whole pipeline, played and compared."""

from lightning_dhellam.search.pipeline.comparison import (
    Compared,
    Comparison,
    Setting,
    compare,
)
from lightning_dhellam.search.pipeline.layers import cut, cut_folded, layers_of
from lightning_dhellam.search.pipeline.least import Chain, LeastCosts
from lightning_dhellam.search.pipeline.links import Link, Links, links_of
from lightning_dhellam.search.pipeline.pipeline_step import PipelineStep
from lightning_dhellam.search.pipeline.playing import (
    PipelineRun,
    StageUse,
    VisitInterval,
    play,
)
from lightning_dhellam.search.pipeline.ranking import Ranked, rank, ranked
from lightning_dhellam.search.pipeline.searched import SEARCHED, Effort, searched
from lightning_dhellam.search.pipeline.visits import (
    LayerCosts,
    UniformCosts,
    VisitCost,
    VisitCosts,
    VisitTable,
)

__all__ = [
    "SEARCHED",
    "Chain",
    "Compared",
    "Comparison",
    "Effort",
    "LayerCosts",
    "LeastCosts",
    "Link",
    "Links",
    "PipelineRun",
    "PipelineStep",
    "Ranked",
    "Setting",
    "StageUse",
    "UniformCosts",
    "VisitCost",
    "VisitCosts",
    "VisitInterval",
    "VisitTable",
    "compare",
    "cut",
    "cut_folded",
    "layers_of",
    "links_of",
    "play",
    "rank",
    "ranked",
    "searched",
]
