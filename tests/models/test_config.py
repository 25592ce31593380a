"""ModelConfig and presets: wrong shapes refused in the user's words, public sizes reproduced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_dhellam.models import PRESETS, parameter_count, preset
from tests.models.llama import SMALL

LONG: dict[str, Any] = {
    "rope_short_factors": [1.0] * 4,
    "rope_long_factors": [2.0] * 4,
    "rope_original_length": 16,
}


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
        ({"embedding_dropout": -0.1}, ["embedding_dropout=-0.1", "[0, 1)"]),
        ({"attention_dropout": 1.0}, ["attention_dropout=1.0", "[0, 1)"]),
        ({"position_embedding": "alibi"}, ["position_embedding='alibi'", "or 'learned' or 'none'"]),
        ({"rope_short_factors": [1.0] * 4}, ["rope_short_factors", "rope_long_factors"]),
        (LONG | {"rope_long_factors": [1.0] * 3}, ["rope_long_factors has 3", "needs 4"]),
        (LONG | {"rope_short_factors": [1.0, 1.0, 0.0, 1.0]}, ["the least 0.0", "greater than 0"]),
        (LONG | {"rope_scaling_factor": 8.0}, ["rope_scaling_factor=8.0", "two scalings"]),
        (LONG | {"position_embedding": "none"}, ["position_embedding='none'", "leave it out"]),
        ({"rope_magnitude": 0.0}, ["rope_magnitude=0.0", "greater than 0"]),
        ({"sliding_window": 0}, ["sliding_window=0", "at least 1"]),
        ({"sliding_window": 4, "attention_dropout": 0.1}, ["attention_dropout=0.1", "no window"]),
        ({"window_layers": [1, 0]}, ["window_layers=(1, 0)", "without sliding_window"]),
        ({"sliding_window": 4, "window_layers": [1]}, ["window_layers=(1,)", "num_layers=2"]),
        ({"sliding_window": 4, "window_layers": [1, 2]}, ["window_layers=(1, 2)", "a 1 (window)"]),
        ({"qk_norm_whole": True}, ["qk_norm_whole=True", "qk_norm=False"]),
        ({"post_norm": True, "attention_bias": True}, ["post_norm=True", "attention_bias=True"]),
        ({"post_norm": True, "num_experts": 4}, ["post_norm=True", "num_experts=4"]),
        ({"linear_bias": 1}, ["linear_bias=1", "true or false"]),
        ({"qkv_bias": "no"}, ["qkv_bias='no'", "true or false"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        replace(SMALL, **changes)
    for word in words:
        assert word in str(error.value)


def test_a_window_is_of_the_layers_that_have_one_unless_it_holds_all_tokens() -> None:
    config = replace(SMALL, sliding_window=16)
    assert config.windows == (16, 16)
    assert replace(config, window_layers=(0, 1)).windows == (None, 16)
    assert replace(config, max_sequence_length=16).windows == (None, None)


MOE = replace(SMALL, num_experts=6, experts_per_token=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 0}, ["num_experts=0", "at least 1"]),
        ({"num_experts": None, "experts_per_token": 4}, ["experts_per_token=4", "num_experts"]),
        ({"experts_per_token": 7}, ["experts_per_token=7", "num_experts=6"]),
        ({"experts_per_token": 1}, ["experts_per_token=1", "router_pre_softmax=True"]),
        ({"moe_layer_freq": 0}, ["moe_layer_freq=0", "at least 1"]),
        ({"moe_layer_freq": [1]}, ["moe_layer_freq=[1]", "num_layers=2"]),
        ({"moe_layer_freq": [1, 2]}, ["moe_layer_freq=[1, 2]", "a 1 (experts) or a 0"]),
        ({"moe_layer_freq": [0, 0]}, ["moe_layer_freq=[0, 0]", "leave num_experts out"]),
        ({"moe_layer_freq": "all"}, ["moe_layer_freq='all'", "whole number"]),
        ({"router_scores": "sinkhorn"}, ["router_scores='sinkhorn'", "'sparsemixer'"]),
        ({"router_scores": "sigmoid", "router_pre_softmax": True}, ["router_pre_softmax=True"]),
        ({"router_bias_update_rate": 0.01}, ["router_bias_update_rate=0.01", "'sigmoid'"]),
        ({"router_scaling_factor": 0.0}, ["router_scaling_factor=0.0", "greater than 0"]),
        ({"z_loss_coefficient": -1.0}, ["z_loss_coefficient=-1.0", "at least 0"]),
        ({"router_bias_update_rate": -0.1}, ["router_bias_update_rate=-0.1", "at least 0"]),
        ({"router_groups": 3}, ["router_groups=3", "without router_groups_per_token"]),
        ({"router_groups": 4, "router_groups_per_token": 2}, ["num_experts=6", "router_groups=4"]),
        ({"router_groups": 3, "router_groups_per_token": 4}, ["router_groups_per_token=4"]),
        (
            {"router_groups": 6, "router_groups_per_token": 3},
            ["router_groups_per_token=3", "experts_per_token=2"],
        ),
        (
            {"router_groups": 6, "router_groups_per_token": 1},
            ["experts_per_token=2", "1 experts of router_groups_per_token=1"],
        ),
        ({"capacity_factor": 0}, ["capacity_factor=0", "leave it out"]),
        ({"drop_policy": "last"}, ["drop_policy='last'", "'probs' or 'position'"]),
        ({"aux_loss": "none"}, ["aux_loss='none'", "'seq_aux_loss'"]),
        ({"linear_bias": True}, ["linear_bias=True", "attention_bias=True"]),
        (
            {"router_scores": "sparsemixer", "experts_per_token": 3},
            ["experts_per_token=3", "leave it at 2"],
        ),
        ({"router_scores": "sparsemixer", "router_jitter": 0.0}, ["router_jitter=0.0"]),
        ({"router_scores": "sparsemixer", "capacity_factor": 1.0}, ["capacity_factor=1.0"]),
    ],
)
def test_experts_that_do_not_fit_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        replace(MOE, **changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("freq", "layers"),
    [
        (1, (True, True, True, True)),
        (3, (True, False, False, True)),
        ([0, 1, 1, 0], (False, True, True, False)),
    ],
)
def test_layers_have_experts_by_number_or_by_pattern(freq: Any, layers: tuple[bool, ...]) -> None:
    config = replace(MOE, num_layers=4, moe_layer_freq=freq)
    assert config.expert_layers == layers
    assert replace(SMALL, num_layers=2).expert_layers == (False, False)
    # A list is kept as what does not change, so that configurations can be compared and kept.
    assert config == replace(config, moe_layer_freq=config.moe_layer_freq) and hash(config)


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, (1, 4), ["num_experts=6", "expert_parallel_size=4", "1, 2, 3, 6"]),
        ({"expert_ffn_hidden_size": 33}, (2, 2), ["expert_ffn_hidden_size=33", "size=2"]),
        ({"shared_expert_ffn_hidden_size": 33}, (2, 1), ["shared_expert_ffn_hidden_size=33"]),
        ({"ffn_hidden_size": 33}, (2, 1), ["ffn_hidden_size=33", "expert_tensor_parallel_size=1"]),
    ],
)
def test_experts_that_cannot_be_cut_are_refused(
    changes: dict[str, Any], sizes: tuple[int, int], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        replace(MOE, **changes).validate(*sizes)
    for word in words:
        assert word in str(error.value)


def test_experts_are_cut_only_where_they_are_shared() -> None:
    replace(MOE, expert_ffn_hidden_size=33).validate(2, 6, expert_tensor_parallel_size=1)
    with pytest.raises(ValueError, match=r"expert_parallel_size=2, but the model has no experts"):
        SMALL.validate(1, 2)


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
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "phi-3-mini": 3_821_079_552,
    "olmo-2-7b": 7_298_617_344,
    "mixtral-8x7b": 46_702_792_704,
    "phi-3.5-moe": 41_873_153_344,
    "qwen3-30b-a3b": 30_532_122_624,
}


def test_presets_have_the_published_number_of_weights() -> None:
    assert {name: parameter_count(PRESETS[name]) for name in PUBLIC_TOTALS} == PUBLIC_TOTALS
    # Of these the paper says so many, and how they are made: rounded.
    of_paper = {"gpt-3-6.7b": 6.7e9, "gpt-3-175b": 175e9}
    for name, total in of_paper.items():
        assert abs(parameter_count(PRESETS[name]) - total) <= 0.01 * total
    tiny = {"gpt2-tiny", "llama-tiny", "moe-tiny", "deepseek-moe-tiny"}
    assert all(1e6 < parameter_count(PRESETS[name]) < 8e6 for name in tiny)
    assert set(PRESETS) == {*PUBLIC_TOTALS, *of_paper, *tiny}


def test_presets_differ_where_the_generations_do() -> None:
    for name, factor, length in (
        ("llama-3-8b", None, 8192),
        ("llama-3.1-70b", 8.0, 131072),
        ("llama-3.2-1b", 32.0, 131072),
    ):
        assert PRESETS[name].rope_scaling_factor == factor
        assert PRESETS[name].max_sequence_length == length
    published = [name for name in PUBLIC_TOTALS if PRESETS[name].tie_embeddings]
    of_gpt = [name for name in PUBLIC_TOTALS if name.startswith("gpt2")]
    assert published == [*of_gpt, "llama-3.2-1b", "llama-3.2-3b"]


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
