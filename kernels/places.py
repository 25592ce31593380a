"""Where a backend can compute: rules of devices and types, each with what it says where not."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

Refusal = Callable[[torch.device, torch.dtype], str | None]
"""Why a device and a type cannot be used, or None if they can."""


def never(device: torch.device) -> bool:
    """Return False: nothing is chosen unless it is asked for."""
    return False


def anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse nothing."""
    return None


def for_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse CPUs, unless Triton's interpreter is on."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton compiles for GPUs, and the device is '{device.type}'"


def on_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse everything but CPUs."""
    return None if device.type == "cpu" else f"it runs on the CPU, and the device is {device.type}"


def on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse everything but GPUs."""
    return None if device.type == "cuda" else f"it needs a GPU, and the device is {device.type}"


def on_cuda_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse everything but GPUs, and types other than float16 and bfloat16."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes float16 and bfloat16, and the activations are {_short(dtype)}"
    return on_cuda(device, dtype)


def on_ampere_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse also GPUs before the A100."""
    obstacle = on_cuda_in_16_bits(device, dtype)
    if obstacle is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (A100) or newer"
    return obstacle


def unordered_on_ampere_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse also where sums must be taken in one order."""
    obstacle = on_ampere_in_16_bits(device, dtype)
    if obstacle is None and torch.are_deterministic_algorithms_enabled():
        return (
            "its backward adds up in an order that varies, and"
            " torch.use_deterministic_algorithms is on"
        )
    return obstacle


def is_hopper(device: torch.device) -> bool:
    """Return whether it is an H100, H200 or another of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def on_hopper_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse all but Hopper and Blackwell for data centres, in float16 and bfloat16."""
    # 12.x runs its forward, but has no deterministic backward.
    return on_cuda_in_16_bits(device, dtype) or _before_hopper_or_after(device)


def for_triton_on_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse also GPUs without descriptors, or without memory for large tiles, as 12.x."""
    obstacle = for_triton(device, dtype)
    return obstacle or (_before_hopper_or_after(device) if device.type == "cuda" else None)


def _before_hopper_or_after(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if (9, 0) <= capability < (12, 0):
        return None
    return (
        "it needs compute capability 9.0 (H100) to 11.x, and this GPU has"
        f" {capability[0]}.{capability[1]}"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
