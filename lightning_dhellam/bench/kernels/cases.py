"""What `dhellam bench kernels` times: operators at training sizes, and the bytes they must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels import choose, fp8, permute
from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.candidates import CANDIDATES

Call = Callable[..., Any]
Make = Callable[[], tuple[Tensor, ...]]

_EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        operator: The operator whose backends have the kernel.
        name: The kernel's name in the table.
        of: Takes the kernel out of a backend.
        make: Makes fresh random arguments.
        extra: The arguments after those.
        moved: Bytes that must be moved: each input read once, each output written once.
        tokens: Rows of the tensors.
        width: The width of the model, or the columns of the logits.
        captured: Whether it is timed as a CUDA graph; a rival that waits for the device cannot be.
    """

    operator: str
    name: str
    of: Callable[[Any], Call]
    make: Make
    extra: tuple[Any, ...]
    moved: int
    tokens: int
    width: int
    captured: bool = True

    def ours(self, kernels: choose.Kernels) -> Call:
        """The kernel of the backend that was chosen."""
        return self.of(getattr(kernels, self.operator))

    def plain(self) -> Call:
        """The kernel of the operator's reference."""
        return self.of(CANDIDATES[self.operator]["reference"].load())


def all_cases(
    tokens: Sequence[int], hidden: Sequence[int], vocabulary: Sequence[int], device: torch.device
) -> list[Case]:
    """Every kernel at every size, the smallest sizes first."""
    return [
        case
        for rows in tokens
        for sizes, cases in ((hidden, _hidden_cases), (vocabulary, _loss_cases))
        for width in sizes
        for case in cases(rows, width, device)
    ]


def _hidden_cases(tokens: int, hidden: int, device: torch.device) -> Iterator[Case]:
    """The kernels of a Llama-3 layer: heads of 128, 4 queries to a key, an MLP 3.5 hidden sizes."""
    draw = partial(_draw, device)
    n, wide, row = tokens, hidden * 7 // 2, (tokens, hidden)
    x, gates = 2 * n * hidden, 2 * n * wide
    weight = (hidden,)

    def case(operator: str, name: str, function: str, make: Make, moved: int, *extra: Any) -> Case:
        return Case(operator, name, attrgetter(function), make, extra, moved, n, hidden)

    def statistics(count: int) -> Tensor:
        return torch.rand((n, count), device=device) + 0.5

    eps = _EPSILON
    yield case("rms_norm", "rms_norm", "forward", lambda: draw(row, weight), 2 * x, eps)
    yield case(
        "rms_norm", "residual + rms_norm", "residual_forward",
        lambda: draw(row, row, weight), 4 * x, eps,
    )  # fmt: skip
    yield case(
        "rms_norm", "rms_norm grad", "backward",
        lambda: (*draw(row, row, weight), statistics(1), *draw(row)), 4 * x,
    )  # fmt: skip
    yield case("swiglu", "swiglu", "forward", lambda: draw((n, 2 * wide)), 3 * gates)
    yield case(
        "swiglu", "swiglu grad", "backward", lambda: draw((n, wide), (n, 2 * wide)), 5 * gates
    )
    yield from _rope_cases(tokens, hidden, device)
    yield _merge_case(tokens, hidden, device)
    yield from _expert_cases(tokens, hidden, device)
    yield from _cast_cases(tokens, hidden, device)
    yield case(
        "dropout", "dropout + residual", "forward_add", lambda: draw(row, row), 3 * x, 0.1, 1 << 40
    )
    yield case("layer_norm", "layer_norm", "forward", lambda: draw(row, weight, weight), 2 * x, eps)
    yield case(
        "layer_norm", "layer_norm grad", "backward",
        lambda: (*draw(row, row, weight), statistics(2), *draw(row)), 4 * x,
    )  # fmt: skip
    for name in ("gelu", "gelu_tanh"):
        yield case(name, name, "forward", lambda: draw((n, 4 * hidden)), 8 * x)
        yield case(name, f"{name} grad", "backward", lambda: draw(*[(n, 4 * hidden)] * 2), 12 * x)


def _rope_cases(tokens: int, hidden: int, device: torch.device) -> Iterator[Case]:
    size, ratio = min(128, hidden), 4
    heads = Heads(max(1, hidden // (size * ratio)), ratio, size)
    positions = torch.arange(tokens, device=device)
    angles = torch.outer(positions, torch.rand(size // 2, device=device)).repeat(1, 2)
    extra = (positions[:, None], angles.cos(), angles.sin(), heads)
    moved = 4 * tokens * heads.channels + 4 * tokens * size + 8 * tokens
    fused = (tokens, 1, heads.channels)
    queries, keys = (tokens, 1, heads.queries, size), (tokens, 1, heads.groups, size)
    draw = partial(_draw, device)
    case = partial(Case, "rope", extra=extra, moved=moved, tokens=tokens, width=hidden)
    yield case("rope", attrgetter("forward"), lambda: draw(fused))
    yield case("rope grad", attrgetter("backward"), lambda: draw(queries, keys, keys))


def _merge_case(tokens: int, hidden: int, device: torch.device) -> Case:
    """Attention over two blocks of keys that all queries attend to."""
    heads = max(1, hidden // 128)

    def make() -> tuple[Tensor, ...]:
        out, other = _draw(device, *[(tokens, 1, hidden)] * 2)
        lse, other_lse = torch.rand((2, 1, heads, tokens), device=device)
        return out, lse, other, other_lse

    moved = 6 * tokens * hidden + 12 * tokens * heads
    forward = attrgetter("forward")
    return Case("merge", "merge", forward, make, (torch.bfloat16,), moved, tokens, hidden)


def _expert_cases(tokens: int, hidden: int, device: torch.device) -> Iterator[Case]:
    """Two of 16 experts for each token, whose MLP is as wide as two hidden sizes."""
    draw = partial(_draw, device)
    x, rows = 2 * tokens * hidden, 2 * tokens

    def places() -> tuple[Tensor, Tensor]:
        chosen = torch.rand(tokens, 16, device=device).topk(2).indices
        order, place, _ = permute.sort(chosen, 16)
        return order, place

    def weights(*shape: int) -> Tensor:
        return torch.rand(shape, device=device)

    case = partial(Case, extra=(), tokens=tokens, width=hidden)
    yield case(
        "permute", "permute", attrgetter("permute"),
        lambda: (*draw((tokens, hidden)), *places()), moved=3 * x,
    )  # fmt: skip
    yield case(
        "permute", "unpermute", attrgetter("unpermute"),
        lambda: (*draw((rows, hidden)), places()[1], weights(tokens, 2)),
        extra=(torch.bfloat16,), moved=3 * x,
    )  # fmt: skip
    yield case(
        "permute", "unpermute grad", attrgetter("unpermute_backward"),
        lambda: (*draw((tokens, hidden), (rows, hidden)), *places(), weights(tokens, 2)),
        moved=5 * x,
    )  # fmt: skip
    yield case(
        "swiglu", "weighted swiglu", attrgetter("weighted_forward"),
        lambda: (*draw((rows, 4 * hidden)), weights(rows)), moved=12 * x,
    )  # fmt: skip
    yield case(
        "swiglu", "weighted swiglu grad", attrgetter("weighted_backward"),
        lambda: (*draw((rows, 2 * hidden), (rows, 4 * hidden)), weights(rows)), moved=20 * x,
    )  # fmt: skip


def _cast_cases(tokens: int, hidden: int, device: torch.device) -> Iterator[Case]:
    """Hidden states in 8 bits, as they are and turned. A scale of all of them takes a pass more."""
    kinds = {"cast to fp8": (fp8.WHOLE, 6), "cast to fp8 by rows": (fp8.ROWS, 4)}
    kinds["cast to fp8 by squares"] = (fp8.SQUARES, 4)
    for name, (block, size) in kinds.items():
        yield Case(
            "fp8", name, attrgetter("cast"), lambda: _draw(device, (tokens, hidden)),
            (fp8.FORWARD, block), size * tokens * hidden, tokens, hidden,
        )  # fmt: skip


def _loss_cases(tokens: int, columns: int, device: torch.device) -> Iterator[Case]:
    size = 2 * tokens * columns

    def inputs() -> tuple[Tensor, ...]:
        labels = torch.randint(0, columns, (tokens,), device=device)
        return (*_draw(device, (tokens, columns)), labels)

    def grad_inputs() -> tuple[Tensor, ...]:
        lse = torch.full((tokens,), 11.0, device=device)
        return (*inputs(), lse, torch.rand(tokens, device=device))

    case = partial(Case, "cross_entropy", extra=(0, columns), tokens=tokens, width=columns)
    yield case("loss", attrgetter("statistics"), inputs, moved=size)
    yield case("loss grad", attrgetter("backward_"), grad_inputs, moved=2 * size)
    yield case("loss with grad", _loss_with_grad, inputs, moved=3 * size, captured=False)


def _loss_with_grad(backend: Any) -> Call:
    """A call that gives the mean loss, and leaves the gradient in place of the logits."""

    def call(logits: Tensor, labels: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
        loss, lse = backend.combine(backend.statistics(logits, labels, first, valid)[None])
        weights = torch.full_like(lse, 1 / len(labels))
        return loss.mean(), backend.backward_(logits, labels, lse, weights, first, valid)

    return call


def _draw(device: torch.device, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
