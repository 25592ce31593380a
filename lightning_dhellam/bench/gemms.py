"""`dhellam bench gemms`: the GEMMs of a layer through each BLAS library that torch can call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.report import Report, Row, device_name, pick_device
from lightning_dhellam.bench.timing import seconds
from lightning_dhellam.bench.workers import Budget
from lightning_dhellam.kernels.choose import choose
from lightning_dhellam.models import ModelConfig, preset

DESCRIPTION = "GEMMs of a layer and of the head: TFLOP/s forward and backward, by BLAS library"

KINDS = ("forward", "dgrad", "wgrad")
COLUMNS = ("library", "gemm", "tokens", "out", "in", *(f"{kind} TFLOP/s" for kind in KINDS))
LIBRARIES = ("cublas", "cublaslt")


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--preset", default="llama-3-8b", help="shape of the model")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--vocabulary", type=list[int], default=[32000, 128256])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for everything")


def run(options: Namespace) -> Report:
    """Measure every GEMM with every library, as far as the budget goes."""
    budget = Budget(options.budget)
    device = pick_device(options.device)
    report = Report("gemms", device_name(device), COLUMNS, {"preset": options.preset})
    shapes = _shapes(preset(options.preset), options.vocabulary)
    before = torch.backends.cuda.preferred_blas_library() if device.type == "cuda" else None
    for library in LIBRARIES if device.type == "cuda" else ("cpu",):
        if device.type == "cuda":
            torch.backends.cuda.preferred_blas_library(library)
        for name, (outputs, inputs) in shapes.items():
            if not budget.left:
                report.notes["budget"] = "ended before every GEMM was measured"
                break
            row: Row = {"library": library, "gemm": name, "tokens": options.tokens}
            row |= {"out": outputs, "in": inputs}
            row |= _rates(options.tokens, outputs, inputs, device)
            report.rows.append(row)
            print(row, flush=True)
    if before is not None:
        torch.backends.cuda.preferred_blas_library(before)
    report.save(Path(options.output))
    return report


def _shapes(config: ModelConfig, vocabulary: list[int]) -> dict[str, tuple[int, int]]:
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


def _rates(tokens: int, outputs: int, inputs: int, device: torch.device) -> Row:
    """TFLOP/s of the three GEMMs; the weight gradient is added to fp32."""

    def draw(*shape: int) -> Any:
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
        return {
            f"{kind} TFLOP/s": work / seconds([call] * 4, device) / 1e12
            for kind, call in calls.items()
        }
