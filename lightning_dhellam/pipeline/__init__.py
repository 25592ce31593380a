"""The order in which a stage runs its micro-batches, as data."""

from lightning_dhellam.pipeline.schedule import Pass, single_stage

__all__ = ["Pass", "single_stage"]
