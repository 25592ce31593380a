"""Keys and values in 8 bits: a scale for each head of a token, and errors by the spacing."""

from __future__ import annotations

import pytest
import torch

from lightning_dhellam.layers.travelling import Travelling


def test_in_8_bits_they_are_off_by_half_a_spacing() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(9, 2, 3, 64, generator=generator).bfloat16() for _ in range(2))
    k[0, 0, 0] *= 1e4  # one head of one token takes no digits of others
    k[1, 1, 1] = 0
    travelling = Travelling(torch.bfloat16, narrow=True)
    packed = travelling.pack(k, v)
    assert packed.dtype is torch.uint8
    assert packed[0, 0, 0, 0].numel() == travelling.size(64) == 68
    for found, truth in zip(travelling.unpack(packed[:, 2:]), (k[2:], v[2:]), strict=True):
        assert found.dtype is torch.bfloat16
        largest = truth.float().abs().amax(-1, keepdim=True)
        # Half a spacing of E4M3, and that of bf16 which attention reads.
        allowed = truth.float().abs() * (2.0**-4 + 2.0**-8) + largest / 448 * 2.0**-10
        assert ((found.float() - truth.float()).abs() <= allowed).all()
    whole, _ = travelling.unpack(packed)
    assert not whole[1, 1, 1].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    k = torch.ones(2, 1, 1, 16)
    k[1, 0, 0, 3] = bad
    travelling = Travelling(torch.float32, narrow=True)
    found, others = travelling.unpack(travelling.pack(k, torch.ones_like(k)))
    assert not found[1].isfinite().all() and others.equal(torch.ones_like(k))


def test_as_they_are_they_keep_every_bit() -> None:
    k, v = torch.randn(2, 3, 1, 2, 8).unbind()
    travelling = Travelling(torch.float32)
    assert travelling.size(8) == 32
    for found, truth in zip(travelling.unpack(travelling.pack(k, v)), (k, v), strict=True):
        assert found.equal(truth)
