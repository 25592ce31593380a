"""A whole step on a cluster, predicted from the profile of one device."""

from lightning_dhellam.search.cluster.ending import Groups
from lightning_dhellam.search.cluster.known import Known
from lightning_dhellam.search.cluster.machine import BARS, Machine, Origin
from lightning_dhellam.search.cluster.prediction import (
    Advice,
    Candidate,
    Choice,
    LaneUse,
    Prediction,
    StagePrediction,
    VisitSpan,
)
from lightning_dhellam.search.cluster.pricing import Priced, Pricing
from lightning_dhellam.search.cluster.steady import Middle, middle
from lightning_dhellam.search.cluster.step import Played, Straggler, played
from lightning_dhellam.search.cluster.work import THIN, Weights, Work

__all__ = [
    "BARS",
    "THIN",
    "Advice",
    "Candidate",
    "Choice",
    "Groups",
    "Known",
    "LaneUse",
    "Machine",
    "Middle",
    "Origin",
    "Played",
    "Prediction",
    "Priced",
    "Pricing",
    "StagePrediction",
    "Straggler",
    "VisitSpan",
    "Weights",
    "Work",
    "middle",
    "played",
]
