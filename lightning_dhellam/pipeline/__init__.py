"""The folded pipeline: its schedule as data, the split of the layers, the transfers."""

from lightning_dhellam.pipeline.schedule import (
    Edge,
    Schedule,
    Visit,
    Way,
    arrivals,
    departures,
    fold,
    live_activations,
    peak_activations,
)
from lightning_dhellam.pipeline.verify import ScheduleError, verify

__all__ = [
    "Edge",
    "Schedule",
    "ScheduleError",
    "Visit",
    "Way",
    "arrivals",
    "departures",
    "fold",
    "live_activations",
    "peak_activations",
    "verify",
]
