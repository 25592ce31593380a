"""ModelConfig and presets: wrong shapes refused in the user's words, public sizes reproduced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_dhellam.models import PRESETS, parameter_count, preset
from tests.models.llama import SMALL


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 30}, ["hidden_size=30", "num_attention_heads=4", "head_dim"]),
        ({"num_query_groups": 3}, ["num_attention_heads=4", "num_query_groups=3"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"num_layers": 0}, ["num_layers=0", "at least 1"]),
        ({"vocab_size": "53"}, ["vocab_size='53'", "whole number"]),
        ({"hidden_dropout": 1.0}, ["hidden_dropout=1.0", "[0, 1)"]),
        ({"norm_epsilon": 0.0}, ["norm_epsilon=0.0", "greater than 0"]),
        ({"rope_scaling_factor": 0.5}, ["rope_scaling_factor=0.5", "at least 1"]),
        (
            {"rope_scaling_factor": 8.0, "position_embedding": "none"},
            ["rope_scaling_factor=8.0", "position_embedding='none'", "leave it out"],
        ),
        ({"position_embedding": "learned"}, ["position_embedding='learned'", "'rope' or 'none'"]),
        ({"linear_bias": 1}, ["linear_bias=1", "true or false"]),
        ({"qkv_bias": "no"}, ["qkv_bias='no'", "true or false"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        replace(SMALL, **changes)
    for word in words:
        assert word in str(error.value)


def test_heads_of_odd_width_need_no_pairs_without_rotary_embedding() -> None:
    assert replace(SMALL, head_dim=7, position_embedding="none").kv_channels == 7


@pytest.mark.parametrize(
    ("changes", "size", "name"),
    [
        ({}, 4, "num_query_groups=2"),
        ({}, 3, "num_attention_heads=4"),
        ({"ffn_hidden_size": 49}, 2, "ffn_hidden_size=49"),
        ({"max_sequence_length": 63}, 2, "max_sequence_length=63"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(
    changes: dict[str, Any], size: int, name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}.*tensor_parallel_size={size}"):
        replace(SMALL, **changes).validate(size)


@pytest.mark.parametrize(
    ("vocabulary", "size", "padded"),
    [(53, 1, 56), (53, 2, 64), (64, 2, 64), (65, 8, 128), (128256, 8, 128256), (1, 1, 8)],
)
def test_vocabulary_is_padded_to_aligned_equal_shares(
    vocabulary: int, size: int, padded: int
) -> None:
    assert replace(SMALL, vocab_size=vocabulary).padded_vocab_size(size) == padded


# As published with the checkpoints.
PUBLIC_TOTALS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-70b": 70_553_706_496,
}


def test_presets_have_the_published_number_of_weights() -> None:
    assert {name: parameter_count(PRESETS[name]) for name in PUBLIC_TOTALS} == PUBLIC_TOTALS
    assert 2e6 < parameter_count(PRESETS["llama-tiny"]) < 8e6
    assert set(PRESETS) == {*PUBLIC_TOTALS, "llama-tiny"}


def test_presets_differ_where_the_generations_do() -> None:
    for name, factor, length in (
        ("llama-3-8b", None, 8192),
        ("llama-3.1-70b", 8.0, 131072),
        ("llama-3.2-1b", 32.0, 131072),
    ):
        assert PRESETS[name].rope_scaling_factor == factor
        assert PRESETS[name].max_sequence_length == length
    assert [name for name in PRESETS if PRESETS[name].tie_embeddings] == [
        "llama-tiny",
        "llama-3.2-1b",
        "llama-3.2-3b",
    ]


def test_preset_with_overrides() -> None:
    config = preset("llama-3-70b", num_layers=8)
    assert config == replace(PRESETS["llama-3-70b"], num_layers=8)
    assert PRESETS["llama-3-70b"].num_layers == 80


def test_unknown_preset_or_override_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama-3.1-7b'.*did you mean 'llama-3.1-70b'") as error:
        preset("llama-3.1-7b")
    assert "llama-tiny" in str(error.value)
    with pytest.raises(ValueError, match=r"'n_layers'.*did you mean 'num_layers'") as error:
        preset("llama-tiny", n_layers=2)
    assert "rotary_base" in str(error.value)
