"""Families of Hugging Face's models: a small file each, over one table of parameters."""

from __future__ import annotations

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families.family import Family
from lightning_dhellam.models.families.gpt2 import GPT2
from lightning_dhellam.models.families.llama import LLAMA
from lightning_dhellam.models.families.mistral import MISTRAL
from lightning_dhellam.models.families.mixtral import MIXTRAL
from lightning_dhellam.models.families.olmo2 import OLMO2
from lightning_dhellam.models.families.phi3 import PHI3
from lightning_dhellam.models.families.phi_moe import PHI_MOE
from lightning_dhellam.models.families.qwen2 import QWEN2
from lightning_dhellam.models.families.qwen3 import QWEN3
from lightning_dhellam.models.families.qwen3_moe import QWEN3_MOE

FAMILIES = (LLAMA, GPT2, MISTRAL, QWEN2, QWEN3, PHI3, OLMO2, MIXTRAL, QWEN3_MOE, PHI_MOE)
"""All that are known."""

__all__ = ["FAMILIES", "LLAMA", "Family", "check_shape", "family_of"]


def family_of(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family of which a model is: of several, the one that it names, or else the first.

    Args:
        config: of the model, which may name its family.
        model_type: of the family that is meant where the model names none, if it is of that.

    Raises:
        ValueError: it is of none, with the nearest, or not of the one that it names, with what that
            does not have.
    """
    known = {family.model_type: family for family in FAMILIES}
    if config.family is not None:
        if config.family not in known:
            raise ValueError(f"family={config.family!r} is not known here: {', '.join(known)} are")
        check_shape(known[config.family], config)
        return known[config.family]
    if model_type in known and not known[model_type].misfits(config):
        return known[model_type]
    dense = config.num_experts is None
    alike = [family for family in FAMILIES if (family.experts is None) == dense]
    nearest = min(alike, key=lambda family: len(family.misfits(config)))
    check_shape(nearest, config)
    return nearest


def check_shape(family: Family, config: ModelConfig) -> None:
    """Refuse a model that is not of a family.

    Raises:
        ValueError: with what the family does not have.
    """
    other = family.misfits(config)
    if other:
        raise ValueError(
            f"{', '.join(other)}: {family.architecture} has {family.has}, so there is nothing to"
            " convert"
        )
