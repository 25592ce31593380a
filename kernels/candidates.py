"""The table of backends: those of each operator, the fastest first."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lightning_dhellam.kernels.candidate import Candidate
from lightning_dhellam.kernels.places import (
    Refusal,
    anywhere,
    for_triton,
    for_triton_on_hopper,
    is_hopper,
    never,
    on_ampere_in_16_bits,
    on_cpu,
    on_cuda,
    on_hopper_in_16_bits,
    unordered_on_ampere_in_16_bits,
)

_FROM_SOURCE = "build flash-attn 3 from the folder `hopper` of github.com/Dao-AILab/flash-attention"


def _module(path: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(f"lightning_dhellam.kernels.{path}")


def _backend(path: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(_module(path)(), name)()


def _cannot(why: str) -> Candidate:
    """A backend of attention that keeps no documents apart, or drops no weights by counters."""
    return Candidate(lambda: None, lambda device, dtype: why)


def _with_triton(operator: str, refusal: Refusal = for_triton) -> dict[str, Candidate]:
    # On the CPU Triton means its interpreter, which is for tests: it is used only when forced.
    fast = Candidate(
        _module(f"{operator}.triton"),
        refusal,
        "triton",
        automatic=lambda device: device.type == "cuda",
    )
    return {"triton": fast, "reference": _reference(operator)}


_OWN_NUMBERS = (
    "which weights it drops follows from a generator's state and from how its blocks lie, not from"
    " heads and places of tokens: other parallel sizes would drop others"
)
_DRAWING_BY_THEMSELVES = (
    "cudnn",
    "flash_attn",
    "flash_attn_3",
    "torch_flash",
    "transformer_engine",
    "efficient",
)


def _reference(operator: str) -> Candidate:
    return Candidate(_module(f"{operator}.reference"), anywhere)


CANDIDATES: dict[str, dict[str, Candidate]] = {
    "attention": {
        # One H200, S 8192, 32 heads on 8, D 128: forward 0.78 ms, backward 2.28; cuDNN 0.89 and
        # 2.59; flash_attn 1.57 and 4.66.
        "flash_attn_4": Candidate(
            _backend("attention.flash_attn_4", "FlashAttention4"),
            on_hopper_in_16_bits,
            distribution="flash-attn-4",
            extra="lightning-dhellam[flash-attn-4]",
            automatic=is_hopper,
            largest_head=128,
            windows=False,  # a beta, whose backward with one has not been measured here
        ),
        "cudnn": Candidate(
            _backend("attention.sdpa", "CudnnAttention"),
            unordered_on_ampere_in_16_bits,
            largest_head=128,
            windows=False,
        ),
        "flash_attn": Candidate(
            _backend("attention.flash", "FlashAttention"),
            on_ampere_in_16_bits,
            "flash_attn",
            largest_head=256,
            blocks=False,
        ),
        "flash_attn_3": Candidate(
            _backend("attention.flash_attn_3", "FlashAttention3"),
            on_hopper_in_16_bits,
            "flash_attn_interface",
            remedy=_FROM_SOURCE,
            automatic=never,
            largest_head=256,
            blocks=False,
        ),
        "torch_flash": Candidate(
            _backend("attention.sdpa", "TorchFlash"), on_ampere_in_16_bits, largest_head=256
        ),
        "transformer_engine": Candidate(
            _backend("attention.transformer_engine", "TransformerEngineAttention"),
            on_ampere_in_16_bits,
            "transformer_engine",
            largest_head=128,
            blocks=False,
        ),
        "efficient": Candidate(
            _backend("attention.sdpa", "EfficientAttention"), on_cuda, multiple=4
        ),
        "cpu": Candidate(_backend("attention.sdpa", "CpuFlash"), on_cpu),
    },
    "cross_entropy": _with_triton("cross_entropy"),
    "dropout": _with_triton("dropout"),
    "dropped_attention": {
        "flash_attn_4": _cannot("its beta drops no weights"),
        **{name: _cannot(_OWN_NUMBERS) for name in _DRAWING_BY_THEMSELVES},
        "cpu": _cannot("torch's blocked kernel for the CPU drops no weights"),
        "reference": Candidate(_backend("dropped_attention.reference", "Reference"), anywhere),
    },
    "embedding": {"reference": _reference("embedding")},
    "fp8": {
        # One H200, 8192 tokens, weights of 28672 by 4096: a weight's gradient in 1.56 ms where
        # cublas takes 1.72 and triton 2.08.
        "cublaslt": Candidate(_module("fp8.cublaslt"), on_hopper_in_16_bits, "nvmath"),
        "cublas": Candidate(_module("fp8.cublas"), on_hopper_in_16_bits, "triton"),
        # On the CPU its interpreter, for tests.
        "triton": Candidate(
            _module("fp8.triton"), for_triton_on_hopper, "triton", automatic=is_hopper
        ),
        "reference": _reference("fp8"),
    },
    "gelu": _with_triton("gelu"),
    "gelu_tanh": _with_triton("gelu_tanh"),
    "grouped": _with_triton("grouped", for_triton_on_hopper),
    "layer_norm": _with_triton("layer_norm"),
    "linear": {
        "cublas": Candidate(_module("linear.cublas"), on_cuda),
        "reference": _reference("linear"),
    },
    "merge": _with_triton("merge"),
    "packed_attention": {
        "flash_attn_4": _cannot("its beta's variable-length backward has not been measured here"),
        "cudnn": _cannot("torch gives cuDNN no documents of uneven length to keep apart"),
        "torch_flash": Candidate(
            _backend("packed_attention.flash", "TorchFlash"),
            on_ampere_in_16_bits,
            largest_head=256,
        ),
        "flash_attn": Candidate(
            _backend("packed_attention.flash_attn", "PackedFlashAttention"),
            on_ampere_in_16_bits,
            "flash_attn",
            largest_head=256,
            blocks=False,
        ),
        "flash_attn_3": Candidate(
            _backend("packed_attention.flash_attn_3", "PackedFlashAttention3"),
            on_hopper_in_16_bits,
            "flash_attn_interface",
            remedy=_FROM_SOURCE,
            automatic=never,
            largest_head=256,
            blocks=False,
        ),
        "transformer_engine": Candidate(
            _backend("packed_attention.transformer_engine", "PackedTransformerEngineAttention"),
            on_ampere_in_16_bits,
            "transformer_engine",
            largest_head=128,
            blocks=False,
        ),
        "efficient": Candidate(
            _backend("packed_attention.masked", "Efficient"), on_cuda, multiple=4
        ),
        "cpu": Candidate(_backend("packed_attention.reference", "OneByOne"), on_cpu),
    },
    "permute": _with_triton("permute"),
    "rms_norm": _with_triton("rms_norm"),
    "rope": _with_triton("rope"),
    "swiglu": _with_triton("swiglu"),
}
"""Backends of each operator, the fastest first."""
