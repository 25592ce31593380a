"""The search in the first steps of a run: callback, session, profile."""

from lightning_dhellam.autosearch.callback import AutoSearch

__all__ = ["AutoSearch"]
