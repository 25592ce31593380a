"""A schedule that is searched for what visits and transfers cost, and for the memory there is."""

from lightning_dhellam.search.pipeline.searched.search import SEARCHED, Effort, searched

__all__ = ["SEARCHED", "Effort", "searched"]
