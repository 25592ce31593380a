"""The strategy: Lightning's hooks, what they refuse, and how processes start and end."""

from lightning_dhellam.strategy.strategy import DHellamStrategy

__all__ = ["DHellamStrategy"]
