"""Runs plans: tape, lanes, executor, the step."""

from lightning_dhellam.engine.batch import MicroBatch, cut
from lightning_dhellam.engine.lanes import Lanes, make_lanes
from lightning_dhellam.engine.step import Engine
from lightning_dhellam.engine.timing import OperatorTimer, Subject

__all__ = ["Engine", "Lanes", "MicroBatch", "OperatorTimer", "Subject", "cut", "make_lanes"]
