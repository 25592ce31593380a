"""A small model of every family of Hugging Face, saved by transformers, with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.models.families import FAMILIES, family_of
from lightning_dhellam.parallel import ParallelContext
from tests.models.dense import DENSE, hugging_face_dense
from tests.models.llama import SMALL, hugging_face_llama
from tests.models.mixtures import MIXTURES, hugging_face_mixture

EVERY = {"llama": SMALL, **DENSE, **MIXTURES}
"""Small models of all families, by what is particular."""
SHAPES: dict[str, ModelConfig] = {}
"""One model of each family, by the family's name."""
for _config in EVERY.values():
    SHAPES.setdefault(family_of(_config).model_type, _config)


def hugging_face(config: ModelConfig) -> PreTrainedModel:
    """A model of transformers of this shape, of whatever family."""
    if config.num_experts is not None:
        return hugging_face_mixture(config)
    if family_of(config).model_type == "llama":
        return hugging_face_llama(config).eval()
    return hugging_face_dense(config)


def pair_of(config: ModelConfig) -> tuple[CausalLM, PreTrainedModel]:
    """A model of ours in this process, and one of transformers, each with weights of its own."""
    return CausalLM(config, ParallelContext.single(torch.device("cpu"))), hugging_face(config)


def save_folder(config: ModelConfig, folder: Path, size: str = "20KB") -> PreTrainedModel:
    """Save such a model in several files, with what else a folder has; it is given back."""
    model = hugging_face(config)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder, max_shard_size=size)
    save_tokenizer(folder, config.vocab_size)
    return model


def save_tokenizer(folder: Path, tokens: int) -> None:
    """A tokenizer that has so many tokens."""
    vocabulary = {f"t{number}": number for number in range(tokens)}
    fields = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", **fields}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "t3"}')


def families_without_shape() -> set[str]:
    """Families of which no model is tested here."""
    return {family.model_type for family in FAMILIES} - SHAPES.keys()
