"""Times the GEMMs of a layer and of the head, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lightning_dhellam.bench.gemms.eight_bits import rows_in_8_bits
from lightning_dhellam.bench.gemms.experts import expert_rows
from lightning_dhellam.bench.gemms.report import COLUMNS, row_of
from lightning_dhellam.bench.gemms.settings import Settings
from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.bench.report import Report, device_name, pick_device
from lightning_dhellam.bench.timing import seconds
from lightning_dhellam.kernels.choose import choose
from lightning_dhellam.models import ModelConfig, preset

LIBRARIES = ("cublas", "cublaslt")


def measure(settings: Settings, folder: Path) -> Report:
    """Measure every GEMM with every library, as far as the budget goes."""
    budget = Budget(settings.budget)
    device = pick_device(settings.device)
    report = Report("gemms", device_name(device), COLUMNS, {"preset": settings.preset})
    shapes = _shapes(preset(settings.preset), settings.vocabulary)
    for library in _libraries(device):
        for name, shape in shapes.items():
            if not budget.left:
                report.notes["budget"] = "ended before every GEMM was measured"
                break
            rates = _rates(settings.tokens, *shape, device)
            report.rows.append(row_of(library, name, settings.tokens, shape, rates))
            print(report.rows[-1], flush=True)
    others = chain(
        rows_in_8_bits(shapes, settings.tokens, device),
        expert_rows(preset(settings.preset), settings.tokens, device),
    )
    for row in others:
        if not budget.left:
            report.notes["budget"] = "ended before every GEMM was measured"
            break
        report.rows.append(row)
        print(row, flush=True)
    report.save(folder)
    return report


def _libraries(device: torch.device) -> Iterator[str]:
    """The libraries one after the other, each while torch calls it."""
    if device.type != "cuda":
        yield "cpu"
        return
    with _restored_library():
        for library in LIBRARIES:
            torch.backends.cuda.preferred_blas_library(library)
            yield library


@contextmanager
def _restored_library() -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _shapes(config: ModelConfig, vocabulary: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Output and input channels of each linear layer."""
    hidden, wide = config.hidden_size, config.ffn_hidden_size
    heads = config.num_attention_heads * config.kv_channels
    keys = config.num_query_groups * config.kv_channels
    layer = {
        "qkv": (heads + 2 * keys, hidden),
        "proj": (hidden, heads),
        "fc1": (2 * wide, hidden),
        "fc2": (hidden, wide),
    }
    return layer | {f"output {columns}": (columns, hidden) for columns in vocabulary}


def _rates(tokens: int, outputs: int, inputs: int, device: torch.device) -> dict[str, float]:
    """FLOP/s of the three GEMMs by kind; the weight gradient is added to fp32."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    x, dy, weight = draw(tokens, 1, inputs), draw(tokens, 1, outputs), draw(outputs, inputs)
    grad = torch.zeros(outputs, inputs, device=device)
    linear = choose(device, torch.bfloat16).linear
    calls = {
        "forward": lambda: linear.forward(x, weight),
        "dgrad": lambda: linear.dgrad(dy, weight),
        "wgrad": lambda: linear.accumulate_wgrad(grad, dy, x),
    }
    work = 2 * tokens * outputs * inputs
    with torch.no_grad():
        return {kind: work / seconds([call] * 4, device) for kind, call in calls.items()}
