"""Dropout whose mask is a function of its key."""

from __future__ import annotations

import torch

from lightning_dhellam.kernels import dropout
from tests.kernels.checks import drawn


def test_the_key_determines_the_mask(dtype: torch.dtype, device: torch.device) -> None:
    x = drawn((40, 25), dtype, device).abs() + 1
    first = dropout.forward(x, 0.3, 17)
    torch.rand(10, device=device)
    assert torch.equal(dropout.forward(x, 0.3, 17), first)
    assert not torch.equal(dropout.forward(x, 0.3, 18), first)
    assert first.dtype == dtype


def test_backward_drops_what_forward_dropped(dtype: torch.dtype, device: torch.device) -> None:
    x, dy = (drawn((31, 3, 7), dtype, device, seed).abs() + 1 for seed in (0, 1))
    y, dx = dropout.forward(x, 0.4, 5), dropout.backward(dy, 0.4, 5)
    assert torch.equal(y == 0, dx == 0)
    assert torch.equal(dropout.forward(dy, 0.4, 5), dx)


def test_ranks_draw_for_their_tokens_what_one_rank_draws(device: torch.device) -> None:
    x = drawn((12, 2, 1300), torch.float32, device).abs() + 1
    whole = dropout.forward(x, 0.4, 5)
    for places in (torch.arange(6, 9), torch.tensor([11, 0, 4])):
        own = places.to(device)
        assert torch.equal(dropout.forward(x[own], 0.4, 5, own), whole[own])
        assert torch.equal(dropout.backward(x[own], 0.4, 5, own), whole[own])
        added = dropout.forward_add(x[own], x[own], 0.4, 5, own)
        assert torch.equal(added, dropout.forward_add(x, x, 0.4, 5)[own])
    assert not torch.equal(whole[0] == 0, whole[1] == 0)


def test_ranks_draw_for_their_channels_what_one_rank_draws(device: torch.device) -> None:
    x = drawn((5, 6000), torch.float32, device).abs() + 1
    whole = dropout.forward(x, 0.4, 5)
    for first, last in ((0, 3000), (3000, 6000), (2047, 4097)):
        part = x[:, first:last], 0.4, 5, None, (first, 6000)
        assert torch.equal(dropout.forward(*part), whole[:, first:last])
        assert torch.equal(dropout.backward(*part), whole[:, first:last])


def test_keep_rate_and_scale(device: torch.device) -> None:
    x = torch.ones(200_000, device=device)
    for p in (0.1, 0.5):
        y = dropout.forward(x, p, 3)
        # Five standard deviations of the share of 200,000 coins.
        assert abs((y == 0).float().mean().item() - p) < 5 * (p * (1 - p) / 200_000) ** 0.5
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
    assert torch.equal(dropout.forward(x, 0.0, 3), x)


def test_scale_in_bf16_is_rounded_once(device: torch.device) -> None:
    # 1 / 0.9 is 1.1094 in bf16: multiplying by it would shrink every activation by 0.16%.
    x = torch.linspace(1, 2, 129, device=device).to(torch.bfloat16).repeat(50)
    y = dropout.forward(x, 0.1, 3)
    kept = y != 0
    torch.testing.assert_close(y[kept], (x[kept].double() / 0.9).to(torch.bfloat16), rtol=0, atol=0)


def test_other_random_numbers_are_left_alone(device: torch.device) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    dropout.forward(torch.ones(8, device=device), 0.5, 3)
    assert torch.equal(torch.rand(3, device=device), expected)


def test_folded_keys_differ() -> None:
    keys = {
        dropout.derive_key(1, step, rank, micro_batch, layer, salt)
        for step in range(5)
        for rank in range(4)
        for micro_batch in range(4)
        for layer in range(-1, 6)
        for salt in range(3)
    }
    assert len(keys) == 5 * 4 * 4 * 7 * 3
    assert all(0 <= key < 1 << 63 for key in keys)
    assert dropout.derive_key(1, 2, 3) != dropout.derive_key(1, 3, 2)
