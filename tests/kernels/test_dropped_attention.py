"""Attention with dropout of its weights: which are dropped, and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import dropout
from lightning_dhellam.kernels.dropped_attention import Drops, reference
from lightning_dhellam.kernels.dropped_attention.reference import Reference
from lightning_dhellam.kernels.packed_attention import Runs
from tests.kernels.checks import assert_close, drawn

P, KEY = 0.3, 1 << 40
S, B, H, D = 7, 3, 4, 6


def _drops(length: int, heads: int, device: torch.device, p: float = P) -> Drops:
    places = torch.arange(length, device=device)
    return Drops(p, KEY, places, places, length, 0, heads, dropout)


def _factors(drops: Drops, device: torch.device) -> Tensor:
    like = torch.empty(B, drops.heads, drops.length, drops.length, device=device)
    return drops.factors(like, slice(None))


def test_about_as_many_are_dropped_as_asked_for(device: torch.device) -> None:
    factors = _factors(_drops(64, H, device), device)
    values, counts = factors.unique(return_counts=True)
    torch.testing.assert_close(values.tolist(), [0.0, 1 / (1 - P)])
    assert abs(counts[0].item() / factors.numel() - P) < 0.02
    of_rows = factors.flatten(0, 2)
    assert len(of_rows.unique(dim=0)) == len(of_rows), "two queries have the same mask"
    assert not torch.equal(factors, _factors(replace(_drops(64, H, device), key=KEY + 1), device))


@pytest.mark.parametrize("length", [7, 600])
def test_a_part_is_dropped_as_in_the_whole(length: int, device: torch.device) -> None:
    """Of heads, of queries and of keys, wherever they stand."""
    drops = _drops(length, H, device)
    whole = _factors(drops, device)
    queries = torch.tensor([5, 0, 6], device=device)
    keys = torch.tensor([1, 4, 2, 3], device=device)
    part = replace(drops, queries=queries, keys=keys, first=2)
    found = part.factors(torch.empty(B, 2, 2, 4, device=device), slice(1, 3))
    expected = whole[:, 2:].index_select(2, queries[1:]).index_select(3, keys)
    assert torch.equal(found, expected)


RUNS = {
    "whole": None,
    # Documents of 1, 4 and 2 tokens, one of all, and of 3 and 4.
    "packed": ((0, 1, 5, 7, 14, 17, 21), 4),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("packed", RUNS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 1 << 22], ids=["one", "all"])
def test_output_and_every_gradient(
    causal: bool,
    packed: str,
    groups: int,
    at_once: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_AT_ONCE", at_once)
    drops, scale = _drops(S, H, device), 0.4
    shapes = ((S, B, H, D), (S, B, groups, D), (S, B, groups, D), (S, B, H * D))
    q, k, v, dout = (drawn(x, torch.float32, device, n) for n, x in enumerate(shapes))
    seen = torch.ones(B, S, S, dtype=torch.bool, device=device)
    runs, told = None, RUNS[packed]
    if told is not None:
        ends = torch.tensor(told[0], dtype=torch.int32, device=device)
        runs = Runs(ends, ends, told[1])
        tokens = torch.arange(B * S, device=device)
        number = torch.searchsorted(ends[1:].long(), tokens, right=True).view(B, S)
        seen = number[:, :, None] == number[:, None]
    seen = seen.tril() if causal else seen

    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide_q, wide_k, wide_v = (x.permute(1, 2, 0, 3) for x in leaves)
    wide_k, wide_v = (x.repeat_interleave(H // groups, dim=1) for x in (wide_k, wide_v))
    scores = (wide_q @ wide_k.transpose(2, 3) * scale).masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(3) * _factors(drops, device).double()
    truth = (weights @ wide_v).permute(2, 0, 1, 3).flatten(2)
    expected = torch.autograd.grad(truth, leaves, dout.double())

    backend = Reference()
    out, lse = backend.forward(q, k, v, scale, drops, runs, causal=causal)
    found = backend.backward(dout, q, k, v, out, lse, scale, drops, runs, causal=causal)
    assert lse.shape == (B, H, S) and lse.dtype == torch.float32
    names = ("out", "lse", "dq", "dk", "dv")
    wanted = (truth.detach(), scores.logsumexp(3).detach(), *expected)
    both = (dict(zip(names, x, strict=True)) for x in ((out, lse, *found), wanted))
    assert_close(*both, 1e-6)


def test_tokens_without_keys_get_nothing(device: torch.device) -> None:
    """As in a block of keys that has none of a document."""
    q, k, v = (drawn((2, 1, 1, D), torch.float32, device, n) for n in range(3))
    ends = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2], [0, 0, 2])]
    runs, drops = Runs(*ends, 2), _drops(2, 1, device, p=0.0)
    out, lse = Reference().forward(q, k, v, 1.0, drops, runs, causal=False)
    assert lse[0, 0, 0] == -torch.inf and not out[0].any() and out[1].all()
    grads = Reference().backward(out, q, k, v, out, lse, 1.0, drops, runs, causal=False)
    assert not grads[0][0].any() and all(grad.isfinite().all() for grad in grads)
