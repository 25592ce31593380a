"""Every family under plain autograd computes what transformers does."""

from __future__ import annotations

import pytest
import torch

from lightning_dhellam.models import export_huggingface, import_huggingface
from tests.models.folders import EVERY, pair_of
from tests.models.llama import random_batch, relative_error, token_losses


@pytest.mark.parametrize("name", EVERY)
def test_plain_autograd_computes_what_transformers_does(name: str) -> None:
    model, theirs = pair_of(EVERY[name])
    import_huggingface(model, theirs)
    tokens, labels = random_batch(EVERY[name])
    with torch.no_grad():
        assert relative_error(model(tokens), theirs(tokens).logits) <= 1e-5
    with model.context.megatron():
        losses = model(tokens, labels)
        losses.mean().backward()
    expected_losses = token_losses(theirs, tokens, labels)
    expected_losses.mean().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert relative_error(losses.detach(), expected_losses.detach()) <= 1e-5
    gradients = {name: p.grad for name, p in model.named_parameters()}
    found = export_huggingface(model, gradients, in_memory=True)  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, errors
