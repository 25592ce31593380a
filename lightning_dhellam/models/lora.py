"""LoRA: low-rank adapters are trained beside the linear layers of a frozen model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.conversion import Conversion
from lightning_dhellam.models.families import family_of
from lightning_dhellam.nearest import suggestion
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.values import check_fields

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""The linear layers of a layer that may have adapters, by Megatron-core's names."""


COLUMNS = ("linear_qkv", "linear_fc1")
"""Those of them that are column-parallel."""


@dataclass(frozen=True)
class LoRA:
    """Which linear layers get adapters of which rank (LoRA, arXiv 2106.09685).

    A layer's weight W [O, I] is used as `W + scale * B A`, with A [rank, I], uniform at first as
    the weight of a new `torch.nn.Linear`, and B [O, rank], zero at first. Everything but A and B is
    frozen.

    Raises ValueError, naming the field, for a value of another kind or one that cannot be.
    """

    rank: int = 16
    """Rows of A (peft: r)."""

    alpha: float = 32.0
    """The scale is alpha / rank (peft: lora_alpha)."""

    targets: tuple[str, ...] | None = None
    """Names of linear layers: those of Hugging Face, such as `q_proj`, or Megatron-core's, such as
    `linear_qkv`, which stands for all products that it holds. All of attention and of dense MLPs
    when left out."""

    rslora: bool = False
    """Whether the scale is alpha / √rank instead (arXiv 2312.03732; peft: use_rslora)."""

    dropout: float = 0.0
    """Probability of dropping an element of what A reads in training (peft: lora_dropout). Products
    of one weight, such as queries, keys and values, drop the same elements."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.targets is not None:
            object.__setattr__(self, "targets", tuple(self.targets))
            if not self.targets:
                raise ValueError("targets names no layer: name one, or leave it out for all")
        for name in ("rank", "alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")

    @property
    def scale(self) -> float:
        """Factor on what adapters add."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Target:
    """A linear layer that gets an adapter.

    Attributes:
        layer: its number in the model.
        linear: its name in the layer, such as `self_attention.linear_qkv`.
        conversion: of its weight.
        products: which of the tensors that its weight is made of have an adapter.
    """

    layer: int
    linear: str
    conversion: Conversion
    products: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the linear layer in the model."""
        return f"layers.{self.layer}.{self.linear}"

    def numbers(self, topology: Topology) -> Tensor | None:
        """The number among `products` of each row of a column-parallel weight; -1 for none."""
        theirs = self.conversion.theirs
        if len(theirs) == 1:
            return None
        labels = [
            torch.full((shape[0], 1), self.products.index(name) if name in self.products else -1)
            for name, shape in theirs.items()
        ]
        return self.conversion.shard(labels, topology.tp_rank, topology.tp_size).flatten()


def targets_of(config: ModelConfig, lora: LoRA) -> list[Target]:
    """The linear layers of a whole model that get adapters, first to last.

    Raises:
        ValueError: the model has no layer of a name, or it is one of experts.
    """
    weights = list(_weights(config))
    known = dict.fromkeys(
        name for linear, one in weights for name in (*map(product, one.theirs), linear[-1])
    )
    wanted = tuple(known) if lora.targets is None else lora.targets
    if lora.targets is not None:
        _check_known(wanted, list(known), config)
    found = []
    for (layer, path, linear), one in weights:
        products = tuple(t for t in one.theirs if linear in wanted or product(t) in wanted)
        if products:
            found.append(Target(layer, f"{path}.{linear}", one, products))
    return found


def product(tensor: str) -> str:
    """The name of a module of Hugging Face, such as `q_proj`, by that of its weight."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _weights(config: ModelConfig) -> Iterator[tuple[tuple[int, str, str], Conversion]]:
    """The weights of a whole model that may have adapters, by layer and names in it."""
    family = family_of(config)
    of_linear = {f"{linear}.weight": linear.rpartition(".") for linear in LINEARS}
    for one in family.table(config, family.names, config.vocab_size, config.num_experts or 1):
        name = one.ours.removeprefix(f"layers.{one.layer}.")
        if one.layer is not None and name in of_linear:
            path, _, linear = of_linear[name]
            side = 1 if linear in COLUMNS else 0
            if any(shape[side] != config.hidden_size for shape in one.theirs.values()):
                raise ValueError(
                    f"lora: {family.architecture} lays its weights out in another way than adapters"
                    " are, [O, I]: train it without lora"
                )
            yield (one.layer, path, linear), one


def _check_known(wanted: tuple[str, ...], known: list[str], config: ModelConfig) -> None:
    of_experts: tuple[str, ...] = ()
    if config.num_experts is not None:
        of_experts = (*family_of(config).names.parts, "linear_fc1", "linear_fc2")
    for name in wanted:
        if name in of_experts:
            raise ValueError(
                f"targets names '{name}', which experts have: they get no adapters here; leave it"
                f" out, and name some of {', '.join(n for n in known if n not in of_experts)}"
            )
        if name not in known:
            hint = suggestion(name, known) or ":"
            raise ValueError(
                f"targets names '{name}', which no linear layer of the model is called{hint} There"
                f" are {', '.join(known)}"
            )
