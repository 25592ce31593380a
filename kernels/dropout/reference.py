"""Plain torch: the ground truth, and the CPU path.

The mask is drawn again in backward from the same key, so it is never saved, and it cannot depend
on the order in which operators run. Every backend draws the same bits.
"""

from __future__ import annotations

from torch import Tensor

from lightning_dhellam.kernels.dropout.philox import threshold, words

_MASK = (1 << 64) - 1


def derive_key(key: int, *counters: int) -> int:
    """A new 63-bit key from a key and counters (splitmix64's finaliser on each)."""
    for counter in counters:
        key = key * 0x9E3779B97F4A7C15 + counter + 1 & _MASK
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key >> 1


def forward(x: Tensor, p: float, key: int) -> Tensor:
    """Zero each element of `x` with probability `p`, and scale the others by `1 / (1 - p)`."""
    return (x.float() * _factors(x, p, key)).to(x.dtype)


def forward_add(x: Tensor, residual: Tensor, p: float, key: int) -> Tensor:
    """`residual` plus `forward` of `x`, rounded once."""
    return (residual.float() + x.float() * _factors(x, p, key)).to(x.dtype)


def backward(dy: Tensor, p: float, key: int) -> Tensor:
    """Gradient of `forward` by `x`, with the same `p` and `key`."""
    return forward(dy, p, key)


def _factors(like: Tensor, p: float, key: int) -> Tensor:
    """0 or `1 / (1 - p)` for each element, in fp32."""
    keep = words(like.numel(), key, like.device) >= threshold(p)
    return keep.view(like.shape).float().mul_(1 / (1 - p) if p < 1 else 0.0)
