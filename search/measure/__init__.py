"""Measured times: profiles, their files, how they are measured, and trials on real steps."""

from lightning_dhellam.search.measure.clock import Clock
from lightning_dhellam.search.measure.measuring import (
    Bench,
    BenchError,
    Progress,
    Target,
    measure,
    targets,
)
from lightning_dhellam.search.measure.profile import Fingerprint, Profile
from lightning_dhellam.search.measure.routings import mean_of, range_of, with_routings
from lightning_dhellam.search.measure.rows import Key, Samples, Timing
from lightning_dhellam.search.measure.transfers import Transfer
from lightning_dhellam.search.measure.trials import Trials
from lightning_dhellam.search.measure.variants import merged, perturbed, spread

__all__ = [
    "Bench",
    "BenchError",
    "Clock",
    "Fingerprint",
    "Key",
    "Profile",
    "Progress",
    "Samples",
    "Target",
    "Timing",
    "Transfer",
    "Trials",
    "mean_of",
    "measure",
    "merged",
    "perturbed",
    "range_of",
    "spread",
    "targets",
    "with_routings",
]
