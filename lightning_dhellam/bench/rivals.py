"""Liger's kernels (the package liger-kernel, if it is installed) behind our signatures.

Only those that do the same work: its rotary embedding neither regroups heads nor copies values,
and its cross-entropy makes loss and gradient in one call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def liger_calls() -> dict[str, Callable[..., Any]]:
    """By the name of the benchmark's kernel; empty if Liger is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops import fused_add_rms_norm, rms_norm, swiglu
    from liger_kernel.ops.utils import calculate_settings

    def norm_grad(dy: Any, x: Any, weight: Any, rstd: Any, residual: Any) -> Any:
        block, warps = calculate_settings(x.shape[-1])
        return fused_add_rms_norm.fused_add_rms_norm_backward(
            dy, residual, x, weight, rstd.view(-1), 0.0, 0, block, warps, 2, False
        )

    return {
        "rms_norm": lambda x, w, eps: rms_norm.rms_norm_forward(x, w, eps, 0.0, "llama", None),
        "residual + rms_norm": lambda x, r, w, eps: fused_add_rms_norm.fused_add_rms_norm_forward(
            x, r, w, eps, 0.0, "llama"
        ),
        "rms_norm grad": norm_grad,
        "swiglu": swiglu.swiglu_fused_gate_up_forward,
        "swiglu grad": lambda dy, gate_up: swiglu.swiglu_fused_gate_up_backward(gate_up, dy),
    }
