"""What trains a model on one rank: under a Trainer by the strategy, or in a loop of one's own."""

from lightning_dhellam.runner.runner import Runner

__all__ = ["Runner"]
