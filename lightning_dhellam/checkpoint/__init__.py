"""Checkpoints of model-parallel runs."""

from lightning_dhellam.checkpoint.folder import load, misfit, read_topology, save

__all__ = ["load", "misfit", "read_topology", "save"]
