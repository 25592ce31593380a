"""How linear layers compute in 8 bits, by the names that users know, and what is refused of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.kernels.fp8 import FORWARD, GRADIENT, ROWS, SQUARES, WHOLE, Block
from lightning_dhellam.kernels.places import is_hopper
from lightning_dhellam.kernels.protocols import Fp8Kernel


@dataclass(frozen=True)
class Format:
    """What has which scale, in which type of 8 bits.

    Attributes:
        block: of activations and gradients that share a scale.
        squares: of weights.
        gradient: type of gradients; all else is E4M3.
        multiple: what channels must be a multiple of.
        faster: times that products are faster than in bf16, on an H200 whose sheet says 2.
        faster_weight: the same of gradients of weights.
    """

    block: Block
    squares: Block
    gradient: torch.dtype
    multiple: int
    faster: float
    faster_weight: float


FORMATS: Mapping[str, Format] = {
    "current": Format(WHOLE, WHOLE, GRADIENT, 16, 1.8, 1.8),
    # 1,074 TFLOP/s of rows by squares and 877 of rows by rows, where bf16 has 640.
    "blockwise": Format(ROWS, SQUARES, FORWARD, 128, 1.68, 1.37),
}
"""By the names that users know."""


def check_name(fp8: str | None, spelt: str = "") -> None:
    """Refuse what is the name of no format.

    Args:
        fp8: the name.
        spelt: as the user has written it, if not as an argument.

    Raises:
        ValueError: with the names that there are.
    """
    if fp8 is not None and fp8 not in FORMATS:
        rest = "" if spelt else ", or None"
        raise ValueError(f"{spelt or f'fp8={fp8!r}'} must be one of {', '.join(FORMATS)}{rest}")


def check_gathers(fp8: str | None, fp8_all_gather: bool) -> None:
    """Refuse gathers in 8 bits of what is in none.

    Raises:
        ValueError: with the remedy.
    """
    if fp8_all_gather and fp8 is None:
        raise ValueError(
            "fp8_all_gather=True gathers what linear layers read in 8 bits, and fp8=None has none:"
            f" give fp8 as well, one of {', '.join(FORMATS)}"
        )


def check_place(
    fp8: str, device: torch.device, dtype: torch.dtype, forced: Mapping[str, str] | None
) -> None:
    """Refuse a type of activations, or a CPU that was not told to emulate 8 bits.

    Raises:
        ValueError: with the value, the rule and the remedy.
    """
    if dtype is torch.float16:
        raise ValueError(f"fp8={fp8!r} does not work with fp16 activations: use 'bf16-mixed'")
    if dtype is not torch.bfloat16 and device.type == "cuda":
        raise ValueError(f"fp8={fp8!r} casts activations of 16 bits: use precision='bf16-mixed'")
    if device.type != "cuda" and (forced or {}).get("fp8") != "reference":
        raise ValueError(_refusal(fp8, device))


def _refusal(fp8: str, device: torch.device) -> str:
    return (
        f"fp8={fp8!r} needs a GPU of compute capability 9.0 (H100) or newer and bf16 activations,"
        f" and the device is {device.type}: leave fp8 out, or let it be emulated, slowly, by"
        " kernels={'fp8': 'reference'}"
    )


def check_shapes(fp8: str, config: Any, tensor_parallel_size: int) -> None:
    """Refuse a `ModelConfig` whose linear layers cannot be computed in 8 bits.

    Raises:
        ValueError: it has experts, or a size that does not divide.
    """
    if config.num_experts is not None:
        raise ValueError(f"fp8={fp8!r}: {_NO_EXPERTS}")
    heads, keys = config.num_attention_heads, config.num_query_groups
    widths = {
        "hidden_size": config.hidden_size,
        "the heads of a rank": heads * config.kv_channels // tensor_parallel_size,
        "queries, keys and values of a rank": (heads + 2 * keys)
        * config.kv_channels
        // tensor_parallel_size,
        "ffn_hidden_size of a rank": config.ffn_hidden_size // tensor_parallel_size,
    }
    for name, width in widths.items():
        check_width(fp8, name, width)


def check_width(fp8: str, name: str, width: int) -> None:
    """Refuse `width` channels of what `name` says.

    Raises:
        ValueError: they are no multiple of what the format takes.
    """
    multiple = FORMATS[fp8].multiple
    if width % multiple:
        other = " or fp8='current', which takes multiples of 16," if multiple > 16 else ""
        raise ValueError(
            f"fp8={fp8!r} takes channels in multiples of {multiple}, and {name} has {width}: use"
            f" another size,{other} or leave fp8 out"
        )


_NO_EXPERTS = (
    "experts have no GEMMs in 8 bits here: leave fp8 out, or train a model without experts"
)


@dataclass(frozen=True)
class Fp8:
    """How the linear layers of a model compute in 8 bits.

    Attributes:
        name: of the format.
        kernel: what casts and multiplies.
        gathers: whether what tensor-parallel ranks gather travels in 8 bits.
    """

    name: str
    kernel: Fp8Kernel
    gathers: bool = False

    @classmethod
    def of(
        cls,
        fp8: str | None,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        forced: Mapping[str, str] | None,
        all_gather: bool = False,
    ) -> Fp8 | None:
        """What `fp8` names, of these kernels; None for None.

        Raises:
            ValueError: it is unknown, or the device cannot compute it and was not told to emulate.
        """
        check_name(fp8)
        check_gathers(fp8, all_gather)
        if fp8 is None:
            return None
        check_place(fp8, device, dtype, forced)
        emulated = kernels.names["fp8"] == "reference"
        if emulated and "fp8" not in (forced or {}):
            raise ValueError(_refusal(fp8, device))
        if fp8 == "blockwise" and not emulated and device.type == "cuda" and not is_hopper(device):
            raise ValueError(
                "fp8='blockwise' needs a GPU of compute capability 9 (H100, H200), since cuBLAS"
                " multiplies such blocks on no other: use fp8='current'"
            )
        return cls(fp8, kernels.fp8, all_gather)

    @property
    def format(self) -> Format:
        """Blocks and types."""
        return FORMATS[self.name]

    def refuse_experts(self, index: int) -> None:
        """Say that layer `index` has experts, which are not computed in 8 bits."""
        raise ValueError(f"layer {index}: fp8={self.name!r}: {_NO_EXPERTS}")
