"""What a fast version of an operator must agree with: its reference, on fp32 copies of the inputs.

Tests and benchmarks share these cases: no speed is reported for a kernel that fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels import (
    cross_entropy,
    dropout,
    fp8,
    gelu,
    gelu_tanh,
    grouped,
    layer_norm,
    merge,
    permute,
    rms_norm,
    rope,
    swiglu,
)
from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.deterministic import deterministic

LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative error by norm that one rounding of the result explains."""

COARSE = {"fp8": 4e-3}
"""What operators are allowed in any type: Hopper adds up products of 8 bits with 14 bits."""

Pairs = Iterator[tuple[str, Tensor, Tensor]]
"""Name of a tensor, what the backend made, what the reference makes."""


@dataclass(frozen=True)
class Draw:
    """Random inputs of one case.

    Attributes:
        tokens: number of rows.
        width: channels of a row.
        dtype: of activations.
        device: of all tensors.
    """

    tokens: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers in `dtype`."""
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def rows(self) -> Tensor:
        """[tokens, width] in `dtype`."""
        return self.normal(self.tokens, self.width)


def errors(operator: str, backend: Any, draw: Draw) -> dict[str, float]:
    """Relative error of each tensor that `backend` computes for `operator`.

    New memory is filled with NaN, so a value that was never written gives NaN.
    """
    with deterministic(strict=False), torch.no_grad():
        return {name: _distance(a, b) for name, a, b in CASES[operator](backend, draw)}


def check(operator: str, backend: Any, draw: Draw, slack: float = 1.0) -> list[str]:
    """What `backend` gets wrong, one line for each tensor; `slack` multiplies the limits."""
    limit = max(LIMITS[draw.dtype], COARSE.get(operator, 0.0)) * slack
    found = errors(operator, backend, draw)
    return [
        f"{operator}: {name} of {draw.tokens} x {draw.width} in {draw.dtype} is off by {error:.1e},"
        f" more than {limit:.0e}"
        for name, error in found.items()
        if not error <= limit
    ]


def _rms_norm(backend: Any, draw: Draw) -> Pairs:
    x, dy, residual = draw.rows(), draw.rows(), draw.rows()
    weight, eps = draw.normal(draw.width), 1e-5
    y, rstd = backend.forward(x, weight, eps)
    expected, expected_rstd = rms_norm.forward(x.float(), weight, eps)
    yield "y", y, expected
    yield "rstd", rstd, expected_rstd
    for name, extra in (("", None), (" with residual", residual)):
        dx, dweight = backend.backward(dy, x, weight, rstd, extra)
        wide = None if extra is None else extra.float()
        truth = rms_norm.backward(dy.float(), x.float(), weight, expected_rstd, wide)
        yield f"dx{name}", dx, truth[0]
        yield f"dweight{name}", dweight, truth[1]
    total, y, rstd = backend.residual_forward(x, residual, weight, eps)
    yield "sum", total, residual.float() + x.float()
    # What is normalised is the rounded sum.
    expected, expected_rstd = rms_norm.forward(total.float(), weight, eps)
    yield "y of sum", y, expected
    yield "rstd of sum", rstd, expected_rstd


def _layer_norm(backend: Any, draw: Draw) -> Pairs:
    # Far from zero, so that a mean that is not subtracted shows.
    x, dy, residual = draw.rows() + 2, draw.rows(), draw.rows()
    weight, bias, eps = draw.normal(draw.width), draw.normal(draw.width), 1e-5
    y, statistics = backend.forward(x, weight, bias, eps)
    expected, expected_statistics = layer_norm.forward(x.float(), weight, bias, eps)
    yield "y", y, expected
    yield "statistics", statistics, expected_statistics
    for name, extra in (("", None), (" with residual", residual)):
        found = backend.backward(dy, x, weight, statistics, extra)
        wide = None if extra is None else extra.float()
        truth = layer_norm.backward(dy.float(), x.float(), weight, expected_statistics, wide)
        for part, a, b in zip(("dx", "dweight", "dbias"), found, truth, strict=True):
            yield f"{part}{name}", a, b
    total, y, statistics = backend.residual_forward(x, residual, weight, bias, eps)
    yield "sum", total, residual.float() + x.float()
    # What is normalised is the rounded sum.
    expected, expected_statistics = layer_norm.forward(total.float(), weight, bias, eps)
    yield "y of sum", y, expected
    yield "statistics of sum", statistics, expected_statistics


def _gelu(truth: Any, backend: Any, draw: Draw) -> Pairs:
    x, dy = draw.rows() * 2, draw.rows()
    yield "y", backend.forward(x), truth.forward(x.float())
    yield "grad", backend.backward(dy, x), truth.backward(dy.float(), x.float())
    yield from _weighted(backend, truth, dy, x)
    yield from _measured(backend, dy, x)


def _swiglu(backend: Any, draw: Draw) -> Pairs:
    gate_up, dy = draw.normal(draw.tokens, 2 * draw.width), draw.rows()
    yield "y", backend.forward(gate_up), swiglu.forward(gate_up.float())
    grad = backend.backward(dy, gate_up)
    yield "grad", grad, swiglu.backward(dy.float(), gate_up.float())
    yield from _weighted(backend, swiglu, dy, gate_up)
    yield from _measured(backend, dy, gate_up)


def _weighted(backend: Any, truth: Any, dy: Tensor, x: Tensor) -> Pairs:
    """An activation of rows that have weights."""
    weights = torch.rand(len(x), device=x.device)
    y = backend.weighted_forward(x, weights)
    yield "weighted y", y, truth.weighted_forward(x.float(), weights)
    found = backend.weighted_backward(dy, x, weights)
    expected = truth.weighted_backward(dy.float(), x.float(), weights)
    yield from zip(("weighted grad", "grad of weights"), found, expected, strict=True)


def _measured(backend: Any, dy: Tensor, x: Tensor) -> Pairs:
    """An activation that says how large what it makes is."""
    for name, read in (("forward", (x,)), ("backward", (dy, x))):
        made, largest = getattr(backend, f"{name}_measured")(*read)
        yield f"measured {name}", made, getattr(backend, name)(*read).float()
        yield f"largest of {name}", largest.amax().view(1), fp8.largest(made)


def _rope(backend: Any, draw: Draw) -> Pairs:
    groups, ratio, batch = 2, 3, 2 - draw.tokens % 2
    size = max(2, draw.width // (groups * ratio) // 2 * 2)
    heads = Heads(groups, ratio, size)
    length = draw.tokens // batch
    angles = torch.outer(
        torch.arange(2 * length, device=draw.device), torch.rand(size // 2, device=draw.device)
    ).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    qkv = draw.normal(length, batch, groups * (ratio + 2) * size)
    positions = torch.randint(0, 2 * length, (length, batch), device=draw.device)
    y = backend.forward(qkv, positions, cos, sin, heads)
    yield "y", y, rope.forward(qkv.float(), positions, cos, sin, heads)
    q, k, v = heads.split(draw.normal(*qkv.shape))
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    grad = backend.backward(q, k, v, positions, cos, sin, heads)
    tables = positions, cos, sin, heads
    yield "grad", grad, rope.backward(q.float(), k.float(), v.float(), *tables)


def _dropout(backend: Any, draw: Draw) -> Pairs:
    x, residual, p, key = draw.rows(), draw.rows(), 0.3, 0x1234_5678_9ABC_DEF
    yield "y", backend.forward(x, p, key), dropout.forward(x.float(), p, key)
    y = backend.forward_add(x, residual, p, key)
    yield "y with residual", y, dropout.forward_add(x.float(), residual.float(), p, key)
    yield "grad", backend.backward(x, p, key), dropout.backward(x.float(), p, key)
    # Rows of a long sequence, in an order of their own.
    places = 1_000_000 + 7 * torch.randperm(draw.tokens, device=draw.device)
    expected = dropout.forward_add(x.float(), residual.float(), p, key, places)
    yield "y at places", backend.forward_add(x, residual, p, key, places), expected
    # A part of rows that are longer, in more blocks of numbers than it has itself.
    part = 3 * draw.width + 1, 5 * draw.width + 4096
    expected = dropout.forward(x.float(), p, key, places, part)
    yield "y of a part", backend.forward(x, p, key, places, part), expected


def _merge(backend: Any, draw: Draw) -> Pairs:
    """Blocks that all queries attend to, the later half, and of which one attends to no key."""
    heads, batch = 2, 2 - draw.tokens % 2
    rows, channels = draw.tokens // batch, max(1, draw.width // heads) * heads
    out, other = (draw.normal(rows, batch, channels) for _ in range(2))
    lse, other_lse = (3 * torch.randn(batch, heads, rows, device=draw.device) for _ in range(2))
    lse[0, 0, -1] = other_lse[0, -1, -1] = -torch.inf
    for start in (0, rows // 2):
        late = other[start:], other_lse[..., start:]
        for dtype in (draw.dtype, torch.float32):
            y, total = backend.forward(out, lse, *late, dtype)
            assert y.dtype == dtype and total.dtype == torch.float32
            expected = merge.forward(out.float(), lse, late[0].float(), late[1], torch.float32)
            yield f"y from {start} in {dtype}", y, expected[0]
            yield f"weights from {start} in {dtype}", total.exp(), expected[1].exp()


def _fp8(backend: Any, draw: Draw) -> Pairs:
    """Casts by every block, and the products of a linear layer whose sizes GEMMs can have."""
    if draw.device.type == "cuda" and draw.dtype is torch.float32:
        draw = replace(draw, dtype=torch.bfloat16)  # a GPU casts numbers of 16 bits
    x = draw.rows()
    for block in (fp8.WHOLE, fp8.ROWS, fp8.SQUARES):
        for dtype in (fp8.FORWARD, fp8.GRADIENT):
            found, truth = backend.cast(x, dtype, block), fp8.cast(x.float(), dtype, block)
            for name, a, b in zip(("cast", "turned"), found, truth, strict=True):
                yield f"{name} to {dtype} by {block}", fp8.widened(a), fp8.widened(b)
        if block is not fp8.SQUARES:
            yield from _turned_later(backend, x, block)
    parts = torch.stack([part.abs().amax().float() for part in x.split(5)])
    found, truth = backend.cast(x, fp8.FORWARD, largest=parts), fp8.cast(x.float(), fp8.FORWARD)
    for name, a, b in zip(("cast", "turned"), found, truth, strict=True):
        yield f"{name} by the largest of parts", fp8.widened(a), fp8.widened(b)
    for squares, side in ((fp8.WHOLE, 16), (fp8.SQUARES, 128)):
        block = fp8.ROWS if squares else fp8.WHOLE
        # Of few rows no wide product: Triton's interpreter takes its time.
        inputs, outputs = -(-min(draw.width, 16 * draw.tokens) // side) * side, 2 * side
        x, weight = draw.normal(draw.tokens, inputs), draw.normal(outputs, inputs)
        dy = draw.normal(draw.tokens, outputs)
        (x_in, x_turned), (w_in, w_turned), (dy_in, dy_turned) = (
            backend.cast(x, fp8.FORWARD, block),
            backend.cast(weight, fp8.FORWARD, squares),
            backend.cast(dy, fp8.FORWARD if block else fp8.GRADIENT, block),
        )
        bias = draw.normal(outputs)
        product = backend.multiply(x_in, w_in, draw.dtype, bias, fast=True)
        yield f"y by {block}", product, fp8.multiply(x_in, w_in, torch.float32, bias)
        product = backend.multiply(dy_in, w_turned, draw.dtype)
        yield f"dx by {block}", product, fp8.multiply(dy_in, w_turned, torch.float32)
        grad = torch.randn(outputs, inputs, device=draw.device)
        expected = grad.clone()
        backend.accumulate(grad, dy_turned, x_turned)
        fp8.accumulate(expected, dy_turned, x_turned)
        yield f"dweight by {block}", grad, expected


def _turned_later(backend: Any, x: Tensor, block: fp8.Block) -> Pairs:
    """Rows alone, with one scale by the largest number of two parts, and turned afterwards."""
    parts = torch.cat([backend.largest(x), backend.largest(2 * x)])
    yield f"largest by {block}", parts, torch.cat([fp8.largest(x), fp8.largest(2 * x)])
    most = parts if block is None else None
    dtype = fp8.GRADIENT if block is None else fp8.FORWARD
    rows, truth = (one.cast_rows(x, dtype, block, most) for one in (backend, fp8))
    yield f"rows by {block}", fp8.widened(rows), fp8.widened(truth)
    turned, truth = (one.turn(rows) for one in (backend, fp8))
    yield f"turned later by {block}", fp8.widened(turned), fp8.widened(truth)


def _grouped(backend: Any, draw: Draw) -> Pairs:
    """Four groups, of which one has no rows, before rows of none; fresh gradients and old ones."""
    inputs, outputs, groups = -(-draw.width // 32) * 8, 72, 4
    ends = [draw.tokens // 3, draw.tokens // 3, draw.tokens - 1, draw.tokens]
    last = torch.tensor(ends, dtype=torch.int32, device=draw.device)
    x, dy = draw.normal(draw.tokens + 3, inputs), draw.normal(draw.tokens + 3, outputs)
    x[draw.tokens :] = dy[draw.tokens :] = torch.nan
    weights = list(draw.normal(groups, outputs, inputs).unbind())
    wide = [weight.float() for weight in weights]
    y, dx = backend.forward(x, weights, last), backend.data_grad(dy, weights, last)
    yield "y", y[: draw.tokens], grouped.forward(x.float(), wide, last)[: draw.tokens]
    yield "dx", dx[: draw.tokens], grouped.data_grad(dy.float(), wide, last)[: draw.tokens]
    fresh = [True, True, False, False]
    for dtype in (torch.float32, draw.dtype):
        shape = (groups, outputs, inputs)
        grads = list(torch.randn(*shape, device=draw.device).to(dtype).unbind())
        expected = [torch.nan_to_num(grad.float()) for grad in grads]
        for grad in grads[:2]:
            grad.fill_(torch.nan)
        backend.weight_grad(dy, x, grads, fresh, last)
        grouped.weight_grad(dy.float(), x.float(), expected, fresh, last)
        yield f"dweights in {dtype}", torch.stack(grads), torch.stack(expected)
    yield from _biases(backend, dy, last, fresh)


def _biases(backend: Any, dy: Tensor, ends: Tensor, fresh: list[bool]) -> Pairs:
    """Biases of the groups, alone and times a number for each row."""
    count = int(ends[-1])
    for scale in (None, torch.rand(len(dy), device=dy.device)):
        name = "" if scale is None else "scaled "
        biases = list(torch.randn(len(fresh), dy.shape[1], device=dy.device).to(dy.dtype).unbind())
        wide = [bias.float() for bias in biases]
        y = backend.add_bias_(dy.clone(), biases, ends, None, scale)
        expected = grouped.add_bias_(dy.float(), wide, ends, None, scale)
        yield f"{name}biased", y[:count], expected[:count]
        grads, truth = ([bias.float() for bias in biases] for _ in range(2))
        backend.bias_grad(dy, grads, fresh, ends, None, scale)
        grouped.bias_grad(dy.float(), truth, fresh, ends, None, scale)
        yield f"{name}dbiases", torch.stack(grads), torch.stack(truth)


def _permute(backend: Any, draw: Draw) -> Pairs:
    """Two of three groups for each token, a choice that was dropped, and rows of no token."""
    x, dy = draw.rows(), draw.rows()
    chosen = torch.rand(draw.tokens, 3, device=draw.device).topk(2).indices
    chosen[1, 0] = -1
    order, place, _ = permute.sort(chosen, 3)
    order = torch.cat([order, order.new_tensor([-1, -1])])
    rows = backend.permute(x, order)
    yield "rows", rows, permute.permute(x.float(), order)
    yield "rows by place", backend.permute(x, order, place), rows
    weights = torch.rand(draw.tokens, 2, device=draw.device)
    for name, given in (("sum", None), ("weighted sum", weights)):
        for dtype in (draw.dtype, torch.float32):
            y = backend.unpermute(rows, place, given, dtype)
            assert y.dtype == dtype
            truth = permute.unpermute(rows.float(), place, given, torch.float32)
            yield f"{name} in {dtype}", y, truth
    found = backend.unpermute_backward(dy, rows, order, place, weights)
    expected = permute.unpermute_backward(dy.float(), rows.float(), order, place, weights)
    yield from zip(("drows", "dweights"), found, expected, strict=True)


def _cross_entropy(backend: Any, draw: Draw) -> Pairs:
    """A rank in the middle of the vocabulary, with padded columns and labels of other ranks."""
    first, valid = 7, max(1, draw.width - 3)
    logits = draw.rows() * 4
    labels = torch.randint(0, first + draw.width, (draw.tokens,), device=draw.device)
    weights = torch.rand(draw.tokens, device=draw.device)
    found = backend.statistics(logits, labels, first, valid)
    wide = logits.float()
    # Two of the statistics are relative to the third: compare what follows from them.
    loss, lse = cross_entropy.combine(found[None])
    expected, expected_lse = cross_entropy.combine(
        cross_entropy.statistics(wide, labels, first, valid)[None]
    )
    yield "loss", loss, expected
    yield "lse", lse, expected_lse
    of_ranks = torch.rand(3, 3, draw.tokens, device=draw.device) * 4 + 1
    combined = zip(backend.combine(of_ranks), cross_entropy.combine(of_ranks), strict=True)
    for name, (a, b) in zip(("combined loss", "combined lse"), combined, strict=True):
        yield name, a, b
    grad = backend.backward_(logits.clone(), labels, lse, weights, first, valid)
    yield "grad", grad, cross_entropy.backward_(wide, labels, expected_lse, weights, first, valid)


CASES: dict[str, Callable[[Any, Draw], Pairs]] = {
    "gelu": partial(_gelu, gelu),
    "gelu_tanh": partial(_gelu, gelu_tanh),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "dropout": _dropout,
    "fp8": _fp8,
    "merge": _merge,
    "grouped": _grouped,
    "permute": _permute,
    "cross_entropy": _cross_entropy,
}


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wide = expected.double()
    return ((actual.double() - wide).norm() / wide.norm().clamp_min(1e-30)).item()
