"""Adapters of a model: how they get there, what they make of its weights, and how peft calls them.

A `Conversion` says for each of their parameters how it is made of peft's tensors, as the table of
`layout` does for weights: so they are written, read and spread over ranks in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from lightning_dhellam.kernels.dropout import derive_key
from lightning_dhellam.layers.adapter import NAME, Adapter, draw_down
from lightning_dhellam.models.causal_lm import CausalLM
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.conversion import Conversion, Parts, Shape
from lightning_dhellam.models.lora import COLUMNS, LINEARS, LoRA, Target, targets_of

PREFIX = "base_model.model."
"""Which the names of peft's tensors begin with."""

_SALT = 0x10_12A
"""Tells the numbers that adapters draw from all others of a model."""


def add_lora(model: CausalLM, lora: LoRA, seed: int = 1234) -> CausalLM:
    """Freeze `model` and give its layers the adapters that `lora` asks for. Returns it.

    Args:
        model: its layers change; blocks of a user's own keep what they have, and are frozen.
        lora: which adapters.
        seed: of what they draw, which does not depend on parallel sizes.

    Raises:
        ValueError: it has adapters already, or `lora` names what it does not have.
    """
    if model.lora is not None:
        raise ValueError("the model has adapters already: give it one LoRA")
    targets = targets_of(model.config, lora)
    model.requires_grad_(False)
    for target in targets:
        linear = _linear(model, target)
        if linear is None:
            continue
        is_column = isinstance(linear, ColumnParallelLinear)
        own = target.numbers(model.context.topology) if is_column else None
        place = LINEARS.index(target.linear)
        drawn = [
            draw_down(
                lora.rank, linear.input_size, derive_key(seed, _SALT, target.layer, place, number)
            )
            for number, name in enumerate(target.conversion.theirs)
            if name in target.products
        ]
        setattr(linear, NAME, Adapter(linear, lora.rank, lora.scale, own, drawn, lora.dropout))
    model.lora = lora
    return model


def _linear(model: CausalLM, target: Target) -> Any:
    """The module of a target; None where this rank has another, or not that layer."""
    layer = model.layers[target.layer] if target.layer < len(model.layers) else None
    if not isinstance(layer, TransformerLayer):
        return None
    try:
        found = layer.get_submodule(target.linear)
    except AttributeError:
        return None
    return found if type(found) in (ColumnParallelLinear, RowParallelLinear) else None


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that this rank has, by the names of their linear layers."""
    named = model.named_modules()
    return {name.removesuffix(f".{NAME}"): one for name, one in named if isinstance(one, Adapter)}


class MergedWeights(Mapping[str, Tensor]):
    """This rank's parameters by name, each weight with what its adapter adds; made when asked for.

    Sums are computed in fp32 and rounded once, to the type of the weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {
            name: one for name, one in model.named_parameters() if f".{NAME}." not in name
        }
        self._adapters = {f"{name}.weight": one for name, one in adapters_of(model).items()}

    def __getitem__(self, name: str) -> Tensor:
        weight, adapter = self._parameters[name].detach(), self._adapters.get(name)
        if adapter is None:
            return weight
        with torch.no_grad():
            return (weight.float() + adapter.addition()).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def adapter_conversions(config: ModelConfig, lora: LoRA) -> Iterator[Conversion]:
    """How the parameters of all adapters of a whole model are made of peft's tensors."""
    for target in targets_of(config, lora):
        down, up = f"{target.name}.{NAME}.down", f"{target.name}.{NAME}.up"
        cut, whole = (up, down) if _is_column(target) else (down, up)
        letter = {down: "A", up: "B"}
        yield replace(_cut(target, lora.rank, letter[cut], cut), layer=target.layer)
        yield replace(_whole(target, lora.rank, letter[whole], whole), layer=target.layer)


def _is_column(target: Target) -> bool:
    return target.linear.endswith(COLUMNS)


def _shape(target: Target, name: str, rank: int, letter: str) -> Shape:
    rows, columns = target.conversion.theirs[name]
    return (rank, columns) if letter == "A" else (rows, rank)


def _named(target: Target, rank: int, letter: str) -> dict[str, Shape]:
    """The tensors of peft of all products of a linear layer, and their shapes."""
    return {
        f"{PREFIX}{name.removesuffix('.weight')}.lora_{letter}.weight": _shape(
            target, name, rank, letter
        )
        for name in target.products
    }


def _cut(target: Target, rank: int, letter: str, ours: str) -> Conversion:
    """The conversion of the parameter which is cut as the weight is."""
    base, shapes = target.conversion, target.conversion.theirs
    kept = [name in target.products for name in shapes]

    def join(whole: Sequence[Any], own: int, size: int) -> Tensor | Parts:
        given = iter(whole)
        every = [
            next(given) if keep else torch.zeros(_shape(target, name, rank, letter))
            for name, keep in zip(shapes, kept, strict=True)
        ]
        return base.join(every, own, size)

    def split(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        return [one for one, keep in zip(base.split(shards), kept, strict=True) if keep]

    return Conversion(ours, _named(target, rank, letter), join, split)


def _whole(target: Target, rank: int, letter: str, ours: str) -> Conversion:
    """The conversion of the parameter which all ranks have: one matrix below the other."""
    products = len(target.products)
    return Conversion(
        ours,
        _named(target, rank, letter),
        join=lambda whole, own, size: torch.cat([one[:] for one in whole]),
        split=lambda shards: list(shards[0].chunk(products)),
    )
