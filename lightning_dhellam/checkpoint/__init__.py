"""Checkpoints of model-parallel runs."""

from lightning_dhellam.checkpoint.content import check_readable
from lightning_dhellam.checkpoint.folder import load, misfit, read_topology, save
from lightning_dhellam.checkpoint.model import check_model, described

__all__ = ["check_model", "check_readable", "described", "load", "misfit", "read_topology", "save"]
