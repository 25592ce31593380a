"""`dhellam bench throughput`: whole training steps under a Trainer, against Hugging Face's Llama.

Both sides take the same batches from the same initial weights, four micro-batches of one sample
to an optimizer step. Ours is `bf16-mixed`: fp32 gradients and fp32 master weights. Theirs is what a
Lightning user writes today: `LlamaForCausalLM`, `bf16-true`, fused AdamW,
`accumulate_grad_batches=4`, eager or compiled.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.report import Report, Row
from lightning_dhellam.bench.sides import Outcome, Shape, huggingface_side, our_side

DESCRIPTION = "token rate and MFU of training steps, against Hugging Face under a plain Trainer"

COLUMNS = (
    "side", "layers", "hidden", "vocabulary", "sequence", "tokens/s", "MFU", "ratio", "peak GiB",
    "loss", "last loss", "grad norm",
)  # fmt: skip
SIDES = ("ours", "eager", "compiled")


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--preset", default="llama-3-8b", help="shape of the model")
    parser.add_argument("--layers", type=int, default=8, help="0 keeps the preset's")
    parser.add_argument("--vocabulary", type=list[int], default=[32000, 128256])
    parser.add_argument("--sequence", type=list[int], default=[8192])
    parser.add_argument("--micro_batches", type=int, default=4, help="to an optimizer step")
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps")
    parser.add_argument("--sides", type=list[str], default=list(SIDES))
    parser.add_argument("--plan", default="interleaved", help="of our side")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the device")


def run(options: Namespace) -> Report:
    """Measure every side at every size."""
    if not torch.cuda.is_available():
        raise ValueError("dhellam bench throughput needs a GPU: there is no CUDA device here")
    unknown = [side for side in options.sides if side not in SIDES]
    if unknown:
        raise ValueError(f"--sides: '{unknown[0]}' is not a side: use {', '.join(SIDES)}")
    report = Report("throughput", COLUMNS, {"preset": options.preset})
    for length in options.sequence:
        for vocabulary in options.vocabulary:
            shape = Shape.of(options, vocabulary, length)
            rows = [_measure(side, shape, options) for side in options.sides]
            _compare(rows)
            report.rows += rows
    return report


def _measure(side: str, shape: Shape, options: Namespace) -> Row:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    row: Row = {
        "side": side,
        "layers": shape.config.num_layers,
        "hidden": shape.config.hidden_size,
        "vocabulary": shape.config.vocab_size,
        "sequence": shape.length,
    }
    try:
        outcome = _run(side, shape, options)
    except torch.cuda.OutOfMemoryError:
        row["failed"] = "out of memory"
        print(row, flush=True)
        return row
    rate = outcome.tokens / outcome.seconds
    row |= {
        "tokens/s": rate,
        "MFU": rate * shape.flops_per_token / (options.peak_tflops * 1e12),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "loss": outcome.losses[0],
        "last loss": outcome.losses[-1],
        "grad norm": outcome.norm,
        "losses": outcome.losses,
    }
    print(row, flush=True)
    return row


def _run(side: str, shape: Shape, options: Namespace) -> Outcome:
    if side == "ours":
        return our_side(shape, options.steps, options.plan)
    return huggingface_side(shape, options.steps, compiled=side == "compiled")


def _compare(rows: list[Row]) -> None:
    """Our rate over the better of the others."""
    others: list[Any] = [r["tokens/s"] for r in rows if r["side"] != "ours" and "tokens/s" in r]
    for row in rows:
        if row["side"] == "ours" and others and "tokens/s" in row:
            row["ratio"] = row["tokens/s"] / max(others)
