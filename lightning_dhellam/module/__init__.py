"""What a LightningModule adds to be trained with two strands, and one that is ready to use."""

from lightning_dhellam.module.building import seed_of_run
from lightning_dhellam.module.language_model import LanguageModel, make_config
from lightning_dhellam.module.mixin import DualStrandMixin

__all__ = ["DualStrandMixin", "LanguageModel", "make_config", "seed_of_run"]
