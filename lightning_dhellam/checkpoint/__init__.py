"""Checkpoints of model-parallel runs."""

from lightning_dhellam.checkpoint.content import check_readable
from lightning_dhellam.checkpoint.description import check_present, holds_state, read_topology
from lightning_dhellam.checkpoint.folder import load, load_state, misfit
from lightning_dhellam.checkpoint.model import check_model, described, origin_of, restore_origin
from lightning_dhellam.checkpoint.newest import newest_whole
from lightning_dhellam.checkpoint.shares import shares_of
from lightning_dhellam.checkpoint.writing import Prepared, host_group, prepare, save, write

__all__ = [
    "Prepared",
    "check_model",
    "check_present",
    "check_readable",
    "described",
    "holds_state",
    "host_group",
    "load",
    "load_state",
    "misfit",
    "newest_whole",
    "origin_of",
    "prepare",
    "read_topology",
    "restore_origin",
    "save",
    "shares_of",
    "write",
]
