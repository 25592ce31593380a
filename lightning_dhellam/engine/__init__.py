"""Runs plans: tape, lanes, executor, the step."""

from lightning_dhellam.engine.batch import MicroBatch, cut
from lightning_dhellam.engine.lanes import make_lanes
from lightning_dhellam.engine.step import Engine
from lightning_dhellam.engine.timing import OperatorTimer, Subject
from lightning_dhellam.engine.trace import Span, Tracer
from lightning_dhellam.engine.tracks import Lanes

__all__ = [
    "Engine",
    "Lanes",
    "MicroBatch",
    "OperatorTimer",
    "Span",
    "Subject",
    "Tracer",
    "cut",
    "make_lanes",
]
