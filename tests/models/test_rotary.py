"""Scaled rotary frequencies: those of transformers, at every length; what does not fit refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_dhellam.models import CausalLM, config_of, import_huggingface
from lightning_dhellam.models.described import config_json
from lightning_dhellam.models.families import family_of
from lightning_dhellam.models.rotary import frequencies, is_scaled
from lightning_dhellam.parallel import ParallelContext
from tests.models.dense import ODD, hugging_face_dense
from tests.models.llama import random_batch, relative_error

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
FACTORS = [1.0 + number / 8 for number in range(32)]
LONG = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
SAID: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn of whole channels, by other bounds": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn untruncated": {**YARN, "truncate": False, "attention_factor": 1.5},
    "yarn of two scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn without length": {"rope_type": "yarn", "factor": 4.0},
    "longrope": {**LONG, "original_max_position_embeddings": 512},
    "longrope with a factor": {**LONG, "original_max_position_embeddings": 512, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _said(scaling: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "intermediate_size": 64,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "rope_parameters": {**scaling, "rope_theta": 5000.0},
        **others,
    }


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("length", [100, 513, 2049, 5000])
def test_frequencies_are_those_of_transformers(name: str, length: int) -> None:
    said = _said(SAID[name])
    ours = config_of(said, max_sequence_length=8192)
    theirs = AutoConfig.for_model(**said)
    found = ROPE_INIT_FUNCTIONS[SAID[name]["rope_type"]](theirs, CPU, seq_len=length)
    torch.testing.assert_close(frequencies(ours, length), found[0], rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(found[1], rel=1e-12)
    assert is_scaled(ours) == (name != "llama3")


@pytest.mark.parametrize("name", SAID)
def test_it_is_said_as_transformers_4_says_it_and_comes_back(name: str) -> None:
    config = config_of(_said(SAID[name]))
    old = _said({}, rope_parameters=None, rope_theta=5000.0, rope_scaling=SAID[name])
    assert config_of(old) == config
    written = config_json(config, family_of(config), None, "float32")
    assert config_of(written) == config
    four = {name: value for name, value in written.items() if name != "rope_parameters"}
    assert config_of(four) == config


def test_sequences_longer_than_the_original_turn_as_in_transformers() -> None:
    said = {"rope_scaling": "dynamic", "rope_scaling_factor": 4.0, "rope_original_length": 16}
    config = replace(ODD, family="mistral", head_dim=12, max_sequence_length=16, **said)
    theirs = hugging_face_dense(config)
    model = CausalLM(replace(config, max_sequence_length=64), ParallelContext.single(CPU))
    import_huggingface(model, theirs)
    tokens, _ = random_batch(config, length=40)
    with torch.no_grad():
        # Shorter ones first: the model of transformers remembers the longest that it has seen.
        for length in (12, 40):
            part = tokens[:, :length]
            assert relative_error(model(part), theirs(part).logits) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": "ntk"}, "rope_scaling='ntk' is not known: use 'llama3' or 'linear'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' without rope_scaling_factor: give"),
        (
            {"rope_scaling": "yarn", "rope_scaling_factor": 2.0},
            "rope_scaling='yarn' without rope_original_length: give the length, in tokens",
        ),
        (
            {"rope_scaling": "linear", "rope_scaling_factor": 2.0, "rope_beta_slow": 40.0},
            r"rope_beta_fast=32\.0 and rope_beta_slow=40\.0: the first must be greater",
        ),
        ({"rotary_fraction": 0.1}, r"rotary_fraction=0\.1 of head_dim=6 is 0 channels: an even"),
        ({"rotary_fraction": 0.5}, r"rotary_fraction=0\.5 of head_dim=6 is 3 channels: an even"),
        ({"rotary_fraction": 1.5}, r"rotary_fraction=1\.5 of head_dim=6 is 9 channels"),
        (
            {"rotary_fraction": 0.75, "position_embedding": "none"},
            r"rotary_fraction=0\.75 with position_embedding='none': there is no rotary",
        ),
        (
            {
                "head_dim": 2,
                "rope_scaling": "dynamic",
                "rope_scaling_factor": 2.0,
                "rope_original_length": 9,
            },
            "rope_scaling='dynamic' with head_dim=2: its base grows by a power",
        ),
    ],
)
def test_scalings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        replace(ODD, **changes)
