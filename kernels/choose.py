"""Which implementation of each operator runs: by device, type and what is installed, or forced.

An implementation is a module with the functions that `protocols` names; of attention it is a
`Backend`. The choice is a value, made once when a model is lowered and handed to its operators.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lightning_dhellam.kernels import packages, protocols
from lightning_dhellam.kernels.attention.base import Backend
from lightning_dhellam.kernels.dropped_attention.base import DroppingBackend
from lightning_dhellam.kernels.packed_attention.base import PackedBackend

Refusal = Callable[[torch.device, torch.dtype], str | None]
"""Why a device and a type cannot be used, or None if they can."""


NO_BLOCKS = (
    "with context parallelism attention is merged from blocks of keys, and it keeps their"
    " log-sum-exp to itself"
)
"""Why a backend of attention cannot be used."""

NO_WINDOW = "it attends to all tokens before, and layers here to a sliding window of them"
"""Why else not."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operator.

    Attributes:
        load: imports it.
        refusal: why it cannot compute on a device in a type.
        package: what must be importable, or None.
        distribution: what must be installed, where the name to import does not tell, or None.
        extra: what to install for that.
        remedy: how to come by it otherwise.
        automatic: on which devices it may be chosen without being asked for.
        largest_head: of attention in 16 bits, whose heads must be a multiple of 8 then; 0 where
            any will do.
        multiple: of what attention's heads must be, where `largest_head` does not say it.
        blocks: whether attention over many keys can be had of it in blocks.
        windows: whether it attends to a sliding window.
    """

    load: Callable[[], Any]
    refusal: Refusal
    package: str | None = None
    distribution: str | None = None
    extra: str = "lightning-dhellam[cuda]"
    remedy: str = ""
    automatic: Callable[[torch.device], bool] = lambda device: True
    largest_head: int = 0
    multiple: int = 1
    blocks: bool = True
    windows: bool = True

    def obstacle(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head: int = 0,
        *,
        in_blocks: bool = False,
        in_window: bool = False,
    ) -> str | None:
        """Why it cannot be used here, with heads of this size, or None if it can.

        `in_blocks` says whether attention is over blocks of keys, whose results are merged, and
        `in_window` whether it is to a sliding window in some layers.
        """
        if in_blocks and not self.blocks:
            return NO_BLOCKS
        if in_window and not self.windows:
            return NO_WINDOW
        return self._lack() or self.refusal(device, dtype) or self._unfit(head)

    def _unfit(self, head: int) -> str | None:
        if self.largest_head and (head % 8 or head > self.largest_head):
            return f"its heads are multiples of 8 up to {self.largest_head}, and these are {head}"
        if head % self.multiple:
            return f"its heads are multiples of {self.multiple}, and these are {head}"
        return None

    def _lack(self) -> str | None:
        """What is not installed as it must be, and the remedy."""
        if self.package is not None and not packages.importable(self.package):
            remedy = self.remedy or f"pip install '{self.extra}'"
            return f"it needs the package {self.package}: {remedy}"
        if self.distribution is not None and not packages.installed(self.distribution):
            return f"it needs the package {self.distribution}: pip install '{self.extra}'"
        if self.distribution is not None and not packages.whole(self.distribution):
            return (
                f"another package has replaced files of {self.distribution}: pip install"
                f" --force-reinstall --no-deps {self.distribution}"
            )
        return None


@dataclass(frozen=True)
class Kernels:
    """The implementation of every operator, and what it is called.

    Attributes:
        names: of the backends, by operator.
    """

    attention: Backend
    cross_entropy: protocols.CrossEntropyKernel
    dropout: protocols.DropoutKernel
    dropped_attention: DroppingBackend
    embedding: protocols.EmbeddingKernel
    gelu: protocols.ActivationKernel
    gelu_tanh: protocols.ActivationKernel
    grouped: protocols.GroupedKernel
    layer_norm: protocols.LayerNormKernel
    linear: protocols.LinearKernel
    merge: protocols.MergeKernel
    packed_attention: PackedBackend
    permute: protocols.PermuteKernel
    rms_norm: protocols.RmsNormKernel
    rope: protocols.RopeKernel
    swiglu: protocols.ActivationKernel
    names: Mapping[str, str]

    def __str__(self) -> str:
        chosen: dict[str, list[str]] = {}
        for operator, name in self.names.items():
            chosen.setdefault(name, []).append(operator)
        return "kernels: " + "; ".join(
            f"{name} for {', '.join(operators)}" for name, operators in chosen.items()
        )


def choose(
    device: torch.device,
    dtype: torch.dtype,
    forced: Mapping[str, str] | None = None,
    head: int = 0,
    *,
    in_blocks: bool = False,
    in_window: bool = False,
) -> Kernels:
    """The fastest usable implementation of each operator, unless `forced` names another.

    Args:
        device: that computes.
        dtype: of activations.
        forced: backends by operator.
        head: size of an attention head; 0 if it is not known.
        in_blocks: whether attention is over blocks of keys, whose results are merged.
        in_window: whether attention is to a sliding window in some layers.

    Raises:
        ValueError: `forced` names an unknown operator or backend, or one that cannot be used here.
    """
    forced = forced or {}
    check_names(forced)
    names = {
        operator: _forced(
            operator,
            forced[operator],
            device,
            dtype,
            head,
            in_blocks=in_blocks,
            in_window=in_window,
        )
        if operator in forced
        else _first(operator, device, dtype, head, in_blocks=in_blocks, in_window=in_window)
        for operator in CANDIDATES
    }
    loaded = {operator: CANDIDATES[operator][name].load() for operator, name in names.items()}
    return Kernels(**loaded, names=names)


def check_names(forced: Mapping[str, str], *, in_blocks: bool = False) -> None:
    """Refuse backends by operator of which there is no such operator, or no such backend of it.

    With `in_blocks` also one that cannot attend to blocks of keys, as context parallelism does.

    Raises:
        ValueError: with the names that there are.
    """
    for operator, name in forced.items():
        if operator not in CANDIDATES:
            raise ValueError(
                f"kernels={{{operator}: {name}}}: there is no operator '{operator}';"
                f" {_suggest(operator, CANDIDATES)}"
            )
        if str(name) not in CANDIDATES[operator]:
            raise ValueError(
                f"kernels={{{operator}: {name}}}: {operator} has no backend '{name}';"
                f" {_suggest(name, CANDIDATES[operator])}"
            )
        if in_blocks and not CANDIDATES[operator][str(name)].blocks:
            others = [other for other, one in CANDIDATES[operator].items() if one.blocks]
            raise ValueError(
                f"kernels={{{operator}: {name}}}: {NO_BLOCKS}; use {' or '.join(others)}, or leave"
                f" {operator} out"
            )


def available(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    head: int = 0,
    *,
    in_blocks: bool = False,
    in_window: bool = False,
) -> Iterator[tuple[str, str | None]]:
    """Every backend of `operator`, with what stands against using it here, or None."""
    for name, candidate in CANDIDATES[operator].items():
        why = candidate.obstacle(device, dtype, head, in_blocks=in_blocks, in_window=in_window)
        yield name, why


def _first(
    operator: str, device: torch.device, dtype: torch.dtype, head: int, **within: bool
) -> str:
    for name, why in available(operator, device, dtype, head, **within):
        if why is None and CANDIDATES[operator][name].automatic(device):
            return name
    raise ValueError(f"no backend of {operator} computes {dtype} on {device.type}")


def _forced(
    operator: str,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head: int,
    **within: bool,
) -> str:
    obstacles = dict(available(operator, device, dtype, head, **within))
    obstacle = obstacles[name]
    if obstacle is not None:
        usable = [other for other, why in obstacles.items() if why is None]
        raise ValueError(
            f"kernels={{{operator}: {name}}} cannot be used here: {obstacle};"
            f" or use {' or '.join(usable)}, or leave {operator} out"
        )
    return name


def _suggest(word: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def _never(device: torch.device) -> bool:
    return False


def _anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _for_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton compiles for GPUs, and the device is '{device.type}'"


def _on_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cpu" else f"it runs on the CPU, and the device is {device.type}"


def _on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else f"it needs a GPU, and the device is {device.type}"


def _on_cuda_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes float16 and bfloat16, and the activations are {_short(dtype)}"
    return _on_cuda(device, dtype)


def _on_ampere_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    obstacle = _on_cuda_in_16_bits(device, dtype)
    if obstacle is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 (A100) or newer"
    return obstacle


def _unordered_on_ampere_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    obstacle = _on_ampere_in_16_bits(device, dtype)
    if obstacle is None and torch.are_deterministic_algorithms_enabled():
        return (
            "its backward adds up in an order that varies, and"
            " torch.use_deterministic_algorithms is on"
        )
    return obstacle


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _on_hopper_in_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    # 12.x runs its forward, but has no deterministic backward.
    return _on_cuda_in_16_bits(device, dtype) or _before_hopper_or_after(device)


def _for_triton_on_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels with descriptors and large tiles cannot run: 12.x has no memory for those."""
    obstacle = _for_triton(device, dtype)
    return obstacle or (_before_hopper_or_after(device) if device.type == "cuda" else None)


def _before_hopper_or_after(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if (9, 0) <= capability < (12, 0):
        return None
    return (
        "it needs compute capability 9.0 (H100) to 11.x, and this GPU has"
        f" {capability[0]}.{capability[1]}"
    )


_FROM_SOURCE = "build flash-attn 3 from the folder `hopper` of github.com/Dao-AILab/flash-attention"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _module(path: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(f"lightning_dhellam.kernels.{path}")


def _backend(path: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(_module(path)(), name)()


def _cannot(why: str) -> Candidate:
    """A backend of attention that keeps no documents apart, or drops no weights by counters."""
    return Candidate(lambda: None, lambda device, dtype: why)


def _with_triton(operator: str, refusal: Refusal = _for_triton) -> dict[str, Candidate]:
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
    return Candidate(_module(f"{operator}.reference"), _anywhere)


CANDIDATES: dict[str, dict[str, Candidate]] = {
    "attention": {
        # One H200, S 8192, 32 heads on 8, D 128: forward 0.78 ms, backward 2.28; cuDNN 0.89 and
        # 2.59; flash_attn 1.57 and 4.66.
        "flash_attn_4": Candidate(
            _backend("attention.flash_attn_4", "FlashAttention4"),
            _on_hopper_in_16_bits,
            distribution="flash-attn-4",
            extra="lightning-dhellam[flash-attn-4]",
            automatic=_is_hopper,
            largest_head=128,
            windows=False,  # a beta, whose backward with one has not been measured here
        ),
        "cudnn": Candidate(
            _backend("attention.sdpa", "CudnnAttention"),
            _unordered_on_ampere_in_16_bits,
            largest_head=128,
            windows=False,
        ),
        "flash_attn": Candidate(
            _backend("attention.flash", "FlashAttention"),
            _on_ampere_in_16_bits,
            "flash_attn",
            largest_head=256,
            blocks=False,
        ),
        "flash_attn_3": Candidate(
            _backend("attention.flash_attn_3", "FlashAttention3"),
            _on_hopper_in_16_bits,
            "flash_attn_interface",
            remedy=_FROM_SOURCE,
            automatic=_never,
            largest_head=256,
            blocks=False,
        ),
        "torch_flash": Candidate(
            _backend("attention.sdpa", "TorchFlash"), _on_ampere_in_16_bits, largest_head=256
        ),
        "transformer_engine": Candidate(
            _backend("attention.transformer_engine", "TransformerEngineAttention"),
            _on_ampere_in_16_bits,
            "transformer_engine",
            largest_head=128,
            blocks=False,
        ),
        "efficient": Candidate(
            _backend("attention.sdpa", "EfficientAttention"), _on_cuda, multiple=4
        ),
        "cpu": Candidate(_backend("attention.sdpa", "CpuFlash"), _on_cpu),
    },
    "cross_entropy": _with_triton("cross_entropy"),
    "dropout": _with_triton("dropout"),
    "dropped_attention": {
        "flash_attn_4": _cannot("its beta drops no weights"),
        **{name: _cannot(_OWN_NUMBERS) for name in _DRAWING_BY_THEMSELVES},
        "cpu": _cannot("torch's blocked kernel for the CPU drops no weights"),
        "reference": Candidate(_backend("dropped_attention.reference", "Reference"), _anywhere),
    },
    "embedding": {"reference": _reference("embedding")},
    "gelu": _with_triton("gelu"),
    "gelu_tanh": _with_triton("gelu_tanh"),
    "grouped": _with_triton("grouped", _for_triton_on_hopper),
    "layer_norm": _with_triton("layer_norm"),
    "linear": {
        "cublas": Candidate(_module("linear.cublas"), _on_cuda),
        "reference": _reference("linear"),
    },
    "merge": _with_triton("merge"),
    "packed_attention": {
        "flash_attn_4": _cannot("its beta's variable-length backward has not been measured here"),
        "cudnn": _cannot("torch gives cuDNN no documents of uneven length to keep apart"),
        "torch_flash": Candidate(
            _backend("packed_attention.flash", "TorchFlash"),
            _on_ampere_in_16_bits,
            largest_head=256,
        ),
        "flash_attn": Candidate(
            _backend("packed_attention.flash_attn", "PackedFlashAttention"),
            _on_ampere_in_16_bits,
            "flash_attn",
            largest_head=256,
            blocks=False,
        ),
        "flash_attn_3": Candidate(
            _backend("packed_attention.flash_attn_3", "PackedFlashAttention3"),
            _on_hopper_in_16_bits,
            "flash_attn_interface",
            remedy=_FROM_SOURCE,
            automatic=_never,
            largest_head=256,
            blocks=False,
        ),
        "transformer_engine": Candidate(
            _backend("packed_attention.transformer_engine", "PackedTransformerEngineAttention"),
            _on_ampere_in_16_bits,
            "transformer_engine",
            largest_head=128,
            blocks=False,
        ),
        "efficient": Candidate(
            _backend("packed_attention.masked", "Efficient"), _on_cuda, multiple=4
        ),
        "cpu": Candidate(_backend("packed_attention.reference", "OneByOne"), _on_cpu),
    },
    "permute": _with_triton("permute"),
    "rms_norm": _with_triton("rms_norm"),
    "rope": _with_triton("rope"),
    "swiglu": _with_triton("swiglu"),
}
"""Backends of each operator, the fastest first."""

assert list(CANDIDATES) == [field.name for field in fields(Kernels) if field.name != "names"]
