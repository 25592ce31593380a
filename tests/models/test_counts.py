"""Operations that a model takes."""

from __future__ import annotations

from dataclasses import replace

from lightning_dhellam.models import (
    active_parameter_count,
    parameter_count,
    preset,
    training_flops_per_token,
)


def test_flops_of_llama_3_8b_are_those_of_its_matrix_products() -> None:
    config = preset("llama-3-8b")
    weights = parameter_count(config) - config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    products = 6 * (weights - norms)
    # Causal: half of the 12 * layers * hidden * length of full attention.
    attention = 6 * config.num_layers * config.hidden_size * 8192
    assert training_flops_per_token(config, 8192) == products + attention


def test_flops_of_attention_are_those_of_the_window() -> None:
    length, window = 4096, 512
    config = preset("llama-3-8b", sliding_window=window)
    whole = preset("llama-3-8b")
    keys = sum(min(token + 1, window) for token in range(length)) / length
    of_attention = 12 * config.num_layers * config.hidden_size * keys
    rest = training_flops_per_token(whole, length) - 6 * 32 * config.hidden_size * length
    found = training_flops_per_token(config, length) - rest
    assert abs(found / of_attention - 1) < 1e-3  # a token's own key is half a key here
    first = replace(config, window_layers=(1,) + (0,) * 31)
    assert 32 * (
        training_flops_per_token(whole, length) - training_flops_per_token(first, length)
    ) == training_flops_per_token(whole, length) - training_flops_per_token(config, length)
    assert training_flops_per_token(config, 512) == training_flops_per_token(whole, 512)


def test_an_embedding_that_is_tied_still_makes_logits() -> None:
    tied = preset("llama-3.2-1b")
    untied = preset("llama-3.2-1b", tie_embeddings=False)
    assert training_flops_per_token(tied, 128) == training_flops_per_token(untied, 128)


def test_a_token_meets_its_own_experts_only() -> None:
    # As published with the models, in billions.
    published = {"mixtral-8x7b": 12.9, "phi-3.5-moe": 6.6, "qwen3-30b-a3b": 3.3}
    for name, billions in published.items():
        assert abs(active_parameter_count(preset(name)) / 1e9 - billions) < 0.06, name
    dense = preset("llama-3-8b")
    assert active_parameter_count(dense) == parameter_count(dense)


def test_flops_are_those_of_the_experts_of_a_token() -> None:
    config = preset("mixtral-8x7b")
    attention = 6 * config.num_layers * config.hidden_size * 4096
    table = config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    products = active_parameter_count(config) - table - norms
    assert training_flops_per_token(config, 4096) == 6 * products + attention
    more = replace(config, num_experts=16)
    routers = 8 * config.num_layers * config.hidden_size
    assert training_flops_per_token(more, 4096) == 6 * (products + routers) + attention
