"""Operations that a model takes."""

from __future__ import annotations

from lightning_dhellam.models import parameter_count, preset, training_flops_per_token


def test_flops_of_llama_3_8b_are_those_of_its_matrix_products() -> None:
    config = preset("llama-3-8b")
    weights = parameter_count(config) - config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    products = 6 * (weights - norms)
    # Causal: half of the 12 * layers * hidden * length of full attention.
    attention = 6 * config.num_layers * config.hidden_size * 8192
    assert training_flops_per_token(config, 8192) == products + attention


def test_an_embedding_that_is_tied_still_makes_logits() -> None:
    tied = preset("llama-3.2-1b")
    untied = preset("llama-3.2-1b", tie_embeddings=False)
    assert training_flops_per_token(tied, 128) == training_flops_per_token(untied, 128)
