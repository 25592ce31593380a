"""How Megatron-core layers are cut into operators, one file per layer kind."""

from lightning_dhellam.layers.head import Loss
from lightning_dhellam.layers.lower import Lowered, lower
from lightning_dhellam.layers.ways import check_exchange, exchanges

__all__ = ["Loss", "Lowered", "check_exchange", "exchanges", "lower"]
