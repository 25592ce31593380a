"""Times the GEMMs of a layer in 8 bits, of operands that are cast already, by each backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_dhellam.bench.gemms.report import row_of
from lightning_dhellam.bench.report import Row
from lightning_dhellam.bench.timing import seconds
from lightning_dhellam.kernels import choose
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.fp8 import FORWARD
from lightning_dhellam.kernels.protocols import Fp8Kernel
from lightning_dhellam.layers.fp8_formats import FORMATS, Format


def rows_in_8_bits(
    shapes: Mapping[str, tuple[int, int]], tokens: int, device: torch.device
) -> Iterator[Row]:
    """Each linear layer of a layer, by format."""
    for name, why in choose.available("fp8", device, torch.bfloat16):
        if why is not None or (name == "reference" and device.type == "cuda"):
            continue  # which is there to be right
        backend = CANDIDATES["fp8"][name].load()
        for form in FORMATS:
            for gemm in ("qkv", "proj", "fc1", "fc2"):
                rates = _rates(backend, FORMATS[form], tokens, *shapes[gemm], device)
                yield row_of(f"fp8 {name}, {form}", gemm, tokens, shapes[gemm], rates)


def _rates(
    backend: Fp8Kernel, form: Format, tokens: int, outputs: int, inputs: int, device: torch.device
) -> dict[str, float]:
    """FLOP/s of the three GEMMs by kind; the weight gradients are added to fp32."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    block, squares, kind = form.block, form.squares, form.gradient
    x, x_turned = backend.cast(draw(tokens, inputs), FORWARD, block)
    weight, weight_turned = backend.cast(draw(outputs, inputs), FORWARD, squares)
    dy, dy_turned = backend.cast(draw(tokens, outputs), kind, block)
    grad = torch.zeros(outputs, inputs, device=device)
    calls = {
        "forward": lambda: backend.multiply(x, weight, torch.bfloat16, fast=True),
        "dgrad": lambda: backend.multiply(dy, weight_turned, torch.bfloat16),
        "wgrad": lambda: backend.accumulate(grad, dy_turned, x_turned),
    }
    work = 2 * tokens * outputs * inputs
    with torch.no_grad():
        return {kind: work / seconds([call] * 4, device) for kind, call in calls.items()}
