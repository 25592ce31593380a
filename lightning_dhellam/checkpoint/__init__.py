"""Checkpoints of model-parallel runs."""

from lightning_dhellam.checkpoint.content import check_readable
from lightning_dhellam.checkpoint.description import check_present, holds_state, read_topology
from lightning_dhellam.checkpoint.folder import load, load_state, misfit, save
from lightning_dhellam.checkpoint.model import check_model, described, origin_of, restore_origin
from lightning_dhellam.checkpoint.shares import shares_of

__all__ = [
    "check_model",
    "check_present",
    "check_readable",
    "described",
    "holds_state",
    "load",
    "load_state",
    "misfit",
    "origin_of",
    "read_topology",
    "restore_origin",
    "save",
    "shares_of",
]
