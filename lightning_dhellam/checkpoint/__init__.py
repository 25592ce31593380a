"""Checkpoints of model-parallel runs."""

from lightning_dhellam.checkpoint.folder import load, misfit, read_topology, save
from lightning_dhellam.checkpoint.model import check_model, described

__all__ = ["check_model", "described", "load", "misfit", "read_topology", "save"]
