"""Which implementation of each operator runs: by device, type and what is installed, or forced.

An implementation is a module with the functions that `protocols` names; of attention it is a
`Backend`. The choice is a value, made once when a model is lowered and handed to its operators.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lightning_dhellam.kernels import protocols
from lightning_dhellam.kernels.attention.base import Backend
from lightning_dhellam.kernels.candidate import NO_BLOCKS
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.dropped_attention.base import DroppingBackend
from lightning_dhellam.kernels.packed_attention.base import PackedBackend


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
    fp8: protocols.Fp8Kernel
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


assert list(CANDIDATES) == [field.name for field in fields(Kernels) if field.name != "names"]
