"""Rows in order of their experts and back, against plain definitions and float64 autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import choose
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.protocols import PermuteKernel
from tests.kernels.checks import TOLERANCE, assert_close, drawn, truth

TOKENS, CHOICES, GROUPS, WIDTH = 37, 3, 6, 40


def _backends(device: torch.device) -> list[PermuteKernel]:
    usable = choose.available("permute", device, torch.bfloat16)
    return [CANDIDATES["permute"][name].load() for name, why in usable if why is None]


def _chosen(device: torch.device, *, dropped: bool = False) -> Tensor:
    """[N, k], of which group 4 is nobody's choice, and perhaps every third is none."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(TOKENS, GROUPS, generator=generator)
    scores[:, 4] = 0
    chosen = scores.topk(CHOICES).indices
    if dropped:
        chosen.view(-1)[::3] = -1
        chosen.view(-1)[::6] = GROUPS
    return chosen.to(device)


@pytest.mark.parametrize("dropped", [False, True], ids=["all", "some dropped"])
def test_rows_are_in_order_of_groups_and_then_of_tokens(
    dropped: bool, device: torch.device
) -> None:
    chosen = _chosen(device, dropped=dropped)
    expected = [
        (token, choice, group)
        for group in range(GROUPS)
        for token in range(TOKENS)
        for choice in range(CHOICES)
        if chosen[token, choice] == group
    ]
    for backend in _backends(device):
        order, place, ends = backend.sort(chosen, GROUPS)
        assert all(t.dtype == torch.int32 for t in (order, place, ends))
        kept = len(expected)
        assert order[:kept].tolist() == [token for token, _, _ in expected]
        assert len(order) == TOKENS * CHOICES and (order[kept:] == -1).all()
        counts = [sum(group == g for _, _, group in expected) for g in range(GROUPS)]
        assert ends.diff(prepend=ends.new_zeros(1)).tolist() == counts and counts[4] == 0
        rows = torch.full_like(place, -1)
        for row, (token, choice, _) in enumerate(expected):
            rows[token, choice] = row
        assert torch.equal(place, rows)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, device: torch.device) -> None:
    x = drawn((tokens, WIDTH), torch.float32, device)
    chosen = torch.full((tokens, 1), 2, device=device)
    for backend in _backends(device):
        order, place, ends = backend.sort(chosen, 4)
        assert ends.tolist() == [0, 0, tokens, tokens]
        rows = backend.permute(x, order)
        assert torch.equal(rows, x) and torch.equal(backend.permute(x, order, place), x)
        assert torch.equal(backend.unpermute(rows, place, None, torch.float32), x)
        weights = torch.ones(tokens, 1, device=device)
        d_rows, d_weights = backend.unpermute_backward(x, rows, order, place, weights)
        assert torch.equal(d_rows, x) and d_weights.shape == (tokens, 1)


def _combined(place: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    real = (place >= 0)[..., None]
    return (rows[place.clamp_min(0).long()] * real * weights[..., None]).sum(1)


@pytest.mark.parametrize("dropped", [False, True], ids=["all", "some dropped"])
def test_permutation_and_its_gradients(
    dropped: bool, dtype: torch.dtype, device: torch.device
) -> None:
    chosen = _chosen(device, dropped=dropped)
    x, dy = (drawn((TOKENS, WIDTH), dtype, device, seed) for seed in range(2))
    weights = drawn((TOKENS, CHOICES), torch.float32, device, 2)
    for backend in _backends(device):
        order, place, _ = backend.sort(chosen, GROUPS)
        rows = backend.permute(x, order)
        assert rows.dtype == dtype and not rows[order < 0].any()
        assert torch.equal(backend.permute(x, order, place), rows)
        assert torch.equal(rows[order >= 0], x[order[order >= 0].long()])
        combine = partial(_combined, place)
        noise = drawn(rows.shape, dtype, device, 3)
        expected, grads = truth(combine, (noise, weights), dy)
        actual = (
            backend.unpermute(noise, place, weights, dtype),
            *backend.unpermute_backward(dy, noise, order, place, weights),
        )
        names = ("y", "d_rows", "d_weights")
        assert [t.dtype for t in actual] == [dtype, dtype, torch.float32]
        assert_close(
            dict(zip(names, actual, strict=True)),
            dict(zip(names, (expected, *grads), strict=True)),
            TOLERANCE[dtype],
        )
        # Backward of `permute`, in fp32 as it may be asked for.
        d_x = backend.unpermute(noise, place, None, torch.float32)
        assert d_x.dtype == torch.float32
        plain = combine(noise.double(), torch.ones_like(weights).double())
        assert_close({"d_x": d_x}, {"d_x": plain}, 1e-6)


def test_rows_of_no_token_have_no_gradient(device: torch.device) -> None:
    """As those have that fill an expert up to its capacity."""
    order = torch.tensor([1, -1, 0, -1], dtype=torch.int32, device=device)
    place = torch.tensor([[2], [0]], dtype=torch.int32, device=device)
    dy, rows = drawn((2, WIDTH), torch.float32, device), drawn((4, WIDTH), torch.float32, device, 1)
    weights = torch.full((2, 1), 0.5, device=device)
    for backend in _backends(device):
        d_rows, _ = backend.unpermute_backward(dy, rows, order, place, weights)
        assert torch.equal(d_rows[[2, 0]], 0.5 * dy)
        assert not d_rows[[1, 3]].any() and not backend.permute(dy, order)[[1, 3]].any()


@pytest.mark.gpu
def test_the_host_waits_for_nothing() -> None:
    device = torch.device("cuda")
    chosen, x = _chosen(device), drawn((TOKENS, WIDTH), torch.bfloat16, device)
    weights = drawn((TOKENS, CHOICES), torch.float32, device, 2)
    for backend in _backends(device):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            order, place, _ = backend.sort(chosen, GROUPS)
            rows = backend.permute(x, order)
            backend.unpermute(rows, place, weights, torch.bfloat16)
            backend.unpermute_backward(x, rows, order, place, weights)
        finally:
            torch.cuda.set_sync_debug_mode(before)
