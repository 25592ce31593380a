"""`dhellam bench kernels`: memory-bound kernels against the bandwidth of a device copy.

GB/s counts the bytes that the operator must move, each input read once and each output written
once, for every implementation alike. A kernel that fails its parity check is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from lightning_dhellam.bench.report import Report
from lightning_dhellam.bench.rivals import liger_calls
from lightning_dhellam.bench.timing import copy_bandwidth, seconds
from lightning_dhellam.kernels import choose, parity

DESCRIPTION = "memory-bound kernels: GB/s against a device copy, torch eager, compiled and Liger"

COLUMNS = (
    "kernel", "tokens", "width", "ours us", "ours GB/s", "of copy",
    "eager GB/s", "compiled GB/s", "liger GB/s",
)  # fmt: skip
_L2 = 256 << 20
"""Bytes that the rotated tensors of one measurement should have together: several L2 caches."""

Make = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        operator: whose implementation it belongs to.
        name: of the kernel, shown.
        function: of the implementation.
        make: fresh random arguments.
        extra: arguments after those.
        moved: bytes that must be moved.
        width: shown.
    """

    operator: str
    name: str
    function: str
    make: Make
    extra: tuple[Any, ...]
    moved: int
    width: int


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--hidden", type=list[int], default=[4096, 8192], help="model widths")
    parser.add_argument("--tokens", type=list[int], default=[8192, 32768], help="rows")
    parser.add_argument("--vocabulary", type=list[int], default=[32000, 128256], help="columns")
    parser.add_argument("--compiled", type=bool, default=True, help="time torch.compile as well")


def run(options: Namespace) -> Report:
    """Measure. Raises RuntimeError if a kernel computes wrong results."""
    if not torch.cuda.is_available():
        raise ValueError("dhellam bench kernels needs a GPU: there is no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = choose.choose(device, torch.bfloat16)
    _check(kernels, device)
    copy = copy_bandwidth()
    notes = {"copy GB/s": copy / 1e9, "backends": str(kernels), "dtype": "bfloat16"}
    report = Report("kernels", COLUMNS, notes)
    for tokens in options.tokens:
        cases = [c for hidden in options.hidden for c in _hidden_cases(tokens, hidden, device)]
        cases += [c for width in options.vocabulary for c in _loss_cases(tokens, width, device)]
        for case in cases:
            report.rows.append(_row(case, tokens, kernels, copy, options.compiled))
            print(report.rows[-1], flush=True)
            torch.cuda.empty_cache()
    return report


def _check(kernels: choose.Kernels, device: torch.device) -> None:
    wrong = [
        line
        for operator in parity.CASES
        for width in (4096, 1001)
        for line in parity.check(
            operator,
            getattr(kernels, operator),
            parity.Draw(1027, width, torch.bfloat16, device),
        )
    ]
    if wrong:
        raise RuntimeError("no times, because results are wrong:\n" + "\n".join(wrong))


def _row(
    case: Case, tokens: int, kernels: choose.Kernels, copy: float, compiled: bool
) -> dict[str, Any]:
    sets = [case.make() for _ in range(max(2, min(8, _L2 // case.moved + 1)))]

    def timed(function: Callable[..., Any]) -> float:
        calls = [partial(function, *arguments, *case.extra) for arguments in sets]
        return case.moved / seconds(calls * (8 // len(calls) or 1))

    ours = getattr(getattr(kernels, case.operator), case.function)
    plain = getattr(_reference(case.operator), case.function)
    rate = timed(ours)
    row = {
        "kernel": case.name,
        "tokens": tokens,
        "width": case.width,
        "ours us": case.moved / rate * 1e6,
        "ours GB/s": rate / 1e9,
        "of copy": f"{rate / copy:.0%}",
        "eager GB/s": timed(plain) / 1e9,
    }
    if compiled:
        torch._dynamo.reset()
        row["compiled GB/s"] = timed(torch.compile(plain, dynamic=False)) / 1e9
    rival = liger_calls().get(case.name)
    if rival is not None:
        row["liger GB/s"] = timed(rival) / 1e9
    return row


def _reference(operator: str) -> Any:
    return choose.CANDIDATES[operator]["reference"].load()


def _hidden_cases(tokens: int, hidden: int, device: torch.device) -> Iterator[Case]:
    """Llama-3 shapes: heads of 128, 4 queries to a key, MLP of 3.5 hidden sizes."""
    rope = choose.CANDIDATES["rope"]["reference"].load()
    n, wide = tokens, hidden * 7 // 2
    x = 2 * n * hidden
    draw = partial(_draw, device)
    weight, statistic = (hidden,), (n, 1)

    def norm_inputs() -> tuple[Tensor, ...]:
        rstd = torch.rand(statistic, device=device) + 0.5
        return (*draw((n, hidden), (n, hidden), weight), rstd, *draw((n, hidden)))

    yield Case(
        "rms_norm", "rms_norm", "forward",
        lambda: draw((n, hidden), weight), (1e-5,), 2 * x, hidden,
    )  # fmt: skip
    yield Case(
        "rms_norm", "residual + rms_norm", "residual_forward",
        lambda: draw((n, hidden), (n, hidden), weight), (1e-5,), 4 * x, hidden,
    )  # fmt: skip
    yield Case("rms_norm", "rms_norm grad", "backward", norm_inputs, (), 4 * x, hidden)
    yield Case("swiglu", "swiglu", "forward", lambda: draw((n, 2 * wide)), (), 6 * n * wide, hidden)
    yield Case(
        "swiglu", "swiglu grad", "backward",
        lambda: draw((n, wide), (n, 2 * wide)), (), 10 * n * wide, hidden,
    )  # fmt: skip
    heads = rope.Heads(hidden // 512, 4, 128)
    table = torch.outer(torch.arange(n, device=device), torch.rand(64, device=device)).repeat(1, 2)
    tables = (table.cos(), table.sin(), heads)
    queries, keys = (n, 1, heads.queries, 128), (n, 1, heads.groups, 128)
    channels = hidden + 2 * heads.groups * 128
    moved = 4 * n * channels + 4 * n * 128
    yield Case("rope", "rope", "forward", lambda: draw((n, 1, channels)), tables, moved, hidden)
    yield Case(
        "rope", "rope grad", "backward", lambda: draw(queries, keys, keys), tables, moved, hidden
    )
    yield Case(
        "dropout", "dropout + residual", "forward_add",
        lambda: draw((n, hidden), (n, hidden)), (0.1, 1 << 40), 3 * x, hidden,
    )  # fmt: skip


def _loss_cases(tokens: int, columns: int, device: torch.device) -> Iterator[Case]:
    size = 2 * tokens * columns

    def inputs() -> tuple[Tensor, ...]:
        labels = torch.randint(0, columns, (tokens,), device=device)
        return (*_draw(device, (tokens, columns)), labels)

    def grad_inputs() -> tuple[Tensor, ...]:
        lse = torch.full((tokens,), 11.0, device=device)
        return (*inputs(), lse, torch.rand(tokens, device=device))

    extra = (0, columns)
    yield Case("cross_entropy", "loss", "statistics", inputs, extra, size, columns)
    yield Case("cross_entropy", "loss grad", "backward_", grad_inputs, extra, 2 * size, columns)


def _draw(device: torch.device, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
