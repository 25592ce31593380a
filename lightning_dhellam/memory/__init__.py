"""How much memory a run takes on every rank, predicted before there is one.

Bytes of saved slots, per layer, per chunk and per rank: `activations.saved_bytes`.
"""

from lightning_dhellam.memory.activations import SavedBytes, activation_peak, saved_bytes
from lightning_dhellam.memory.prediction import RankMemory, Run, predict
from lightning_dhellam.memory.table import memory_table

__all__ = [
    "RankMemory",
    "Run",
    "SavedBytes",
    "activation_peak",
    "memory_table",
    "predict",
    "saved_bytes",
]
