"""Experts as files have them, a tensor for each, and as transformers 5 has them in memory.

There all experts of a layer are one tensor: ``gate_up_proj`` [E, 2F, H], each expert's gate rows
and then its up rows, and ``down_proj`` [E, H, F].
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families.family import Family
from lightning_dhellam.models.stored import Readable

_FUSED = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(gate_up_proj|down_proj)")


def unfused(tensors: Mapping[str, Readable], family: Family) -> Mapping[str, Readable]:
    """Tensors by their names in files; each expert's is a view, of a file's memory map as well."""
    if family.experts is None:
        spelt = {name: family.spelt(name) for name in tensors}
        return {own: tensors[name] for name, own in spelt.items() if own is not None}
    found: dict[str, Readable] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None or len(tensor.shape) != 3:
            found[_in_file(name, family)] = tensor
            continue
        for expert, own in enumerate(tensor[:]):
            names = family.experts.of_expert(int(match[1]), expert)
            if match[2] == "down_proj":
                found[names["down"]] = own
            else:
                both = own.tensor_split(2)
                found |= zip((names["gate"], names["up"]), both, strict=True)
    return found


def fused(tensors: Mapping[str, Tensor], family: Family, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors by their names in memory, from those by their names in files."""
    if family.experts is None or config.num_experts is None:
        return dict(tensors)
    left = dict(tensors)
    found: dict[str, Tensor] = {}
    for layer, has_experts in enumerate(config.expert_layers):
        if not has_experts:
            continue
        each = [family.experts.of_expert(layer, number) for number in range(config.num_experts)]
        own = [{part: left.pop(name) for part, name in names.items()} for names in each]
        prefix = _in_memory(f"model.layers.{layer}.{family.experts.mixture}.experts.", family)
        both = [torch.cat([expert["gate"], expert["up"]]) for expert in own]
        found[f"{prefix}gate_up_proj"] = torch.stack(both)
        found[f"{prefix}down_proj"] = torch.stack([expert["down"] for expert in own])
    return {**{_in_memory(name, family): tensor for name, tensor in left.items()}, **found}


def _in_memory(name: str, family: Family) -> str:
    for file, memory in family.renamed:
        name = name.replace(file, memory)
    return name


def _in_file(name: str, family: Family) -> str:
    for file, memory in family.renamed:
        name = name.replace(memory, file)
    return name
