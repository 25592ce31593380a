"""Which parameters are an expert's, on which ranks they are, and what they are called.

Every rank numbers its experts from 0. To the user, in checkpoints and in messages, an expert has
its number among all of them: rank 1 of 2 calls the third of four experts `local_experts.0`, and the
user `local_experts.2`.

Megatron-core marks an expert's parameter, so that its gradient is reduced over the ranks that hold
the same expert, only where there is expert parallelism; and it says that whole experts are split
over tensor-parallel ranks. With `expert_tensor_parallel_size=1` those ranks hold whole experts, the
same ones or different ones, and such gradients would not be added up, or added to those of another
expert. So here every expert is marked, and by how it lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import Tensor
from torch.nn import Module

from lightning_dhellam.parallel.topology import Topology

_OWN = re.compile(r"(local_experts\.|linear_fc[12]\.(?:weight|bias))(\d+)(.*)")
"""A name inside of a container of experts: `SequentialMLP`'s, or `TEGroupedMLP`'s."""


def mark_experts(model: Module, topology: Topology) -> None:
    """Tell Megatron-core, and `is_expert`, which parameters of `model` are an expert's."""
    for layer in model.modules():
        if isinstance(layer, BaseMoELayer):
            for parameter in layer.experts.parameters():
                parameter.allreduce = False
                if topology.etp_size == 1:
                    parameter.tensor_model_parallel = False


def is_expert(parameter: Tensor) -> bool:
    """Whether `parameter` is an expert's, by the mark of `mark_experts`."""
    return not getattr(parameter, "allreduce", True)


class ExpertNames:
    """The names of a module's experts, by their numbers on this rank and among all.

    Args:
        module: a model, or what holds one.
    """

    def __init__(self, module: Module) -> None:
        self._firsts: dict[str, int] = {
            f"{name}.experts.".lstrip("."): layer.local_expert_indices[0]
            for name, layer in module.named_modules(remove_duplicate=False)
            if isinstance(layer, BaseMoELayer)
        }

    def is_expert(self, name: str) -> bool:
        """Whether `name`, of either kind, is inside of a container of experts."""
        return self._container(name) is not None

    def of_all(self, name: str) -> str:
        """The name among all experts, of what is called `name` on this rank."""
        return self._moved(name, 1)

    def of_rank(self, name: str) -> str:
        """The name on this rank, of what is called `name` among all experts."""
        return self._moved(name, -1)

    def all_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What is by names of this rank in `state`, by the names among all experts."""
        return {self.of_all(name): value for name, value in state.items()}

    def rank_of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What is by names among all experts in `state`, by those of this rank."""
        return {self.of_rank(name): value for name, value in state.items()}

    def split(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is by names of this rank in `state`, by the names among all: all but experts, and
        experts."""
        parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for name, value in state.items():
            parts[self.is_expert(name)][self.of_all(name)] = value
        return parts

    def _container(self, name: str) -> str | None:
        return next((prefix for prefix in self._firsts if name.startswith(prefix)), None)

    def _moved(self, name: str, sign: int) -> str:
        prefix = self._container(name)
        found = None if prefix is None else _OWN.fullmatch(name.removeprefix(prefix))
        if prefix is None or found is None:
            return name
        kind, number, rest = found.groups()
        return f"{prefix}{kind}{int(number) + sign * self._firsts[prefix]}{rest}"
