"""What a family of Hugging Face's models is: its configuration, and how its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.conversion import Conversion
from lightning_dhellam.models.families.rope import LONG, Found, Theirs
from lightning_dhellam.models.layout import EMBEDDING, MixtureNames, conversions
from lightning_dhellam.models.rotary_fields import SCALINGS

Windows = tuple[int | None, ...]
"""How many tokens each attends to in each layer, of itself and those before it; None for all."""

WHOLE, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in Hugging Face: without a window, and with one."""


def _no_window(theirs: Theirs, layers: int) -> Windows:
    return (None,) * layers


def _nothing(theirs: Theirs) -> Found:
    return {}


def _no_more(own: ModelConfig) -> Theirs:
    return {}


def _no_refusal(theirs: Theirs, own: ModelConfig) -> Iterator[str]:
    yield from ()


def _as_in_5(scaling: Theirs) -> Theirs:
    return scaling


def _has_all(config: ModelConfig) -> Iterator[str]:
    yield from ()


def _as_it_is(name: str) -> str | None:
    return name


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face.

    Attributes:
        model_type: its name in `config.json`.
        architecture: its class.
        has: what its models have, in words.
        fixed: fields of a `ModelConfig` of which it has one value only.
        fields: Hugging Face's name of a field, by ours: with what its configuration class takes
            where it is left out.
        only: fields of Hugging Face of which only one value can be expressed here, that which its
            configuration class takes by itself.
        rotary_base: where `rope_theta` is left out.
        rope_types: scalings of rotary frequencies that can be expressed.
        experts: the names of its experts; None for a dense family.
        dense_layers: whether layers without experts may lie between those with them.
        renamed: what transformers 5 calls its modules, by what files call them.
        windows: of each of so many layers.
        more: what its configuration says in a way of its own.
        tells: the same the other way round, what it says so of a model.
        refuses: what else cannot be expressed.
        in_4: what transformers 4 takes for its `rope_scaling`, where 5 would take more.
        training: as `fields`, of what training alone looks at: a `ModelConfig` that is made from
            a configuration takes it over, and weights go to one with any other value.
        lacks: fields of a model that it does not have, as `name=value`, where `fixed` does not say.
        table: its conversions.
        embedding: the name of its embedding.
        spelt: a tensor's name as `table` has it, from that in a file; None if it is no weight.
    """

    model_type: str
    architecture: str
    has: str
    fixed: Mapping[str, Any]
    fields: Mapping[str, tuple[str, Any]]
    only: Mapping[str, Any]
    rotary_base: float = 10_000.0
    rope_types: tuple[str, ...] = ("default", *SCALINGS, LONG)
    experts: MixtureNames | None = None
    dense_layers: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    windows: Callable[[Theirs, int], Windows] = field(default=_no_window)
    more: Callable[[Theirs], Found] = field(default=_nothing)
    tells: Callable[[ModelConfig], Theirs] = field(default=_no_more)
    refuses: Callable[[Theirs, ModelConfig], Iterator[str]] = field(default=_no_refusal)
    in_4: Callable[[Theirs], Theirs] = field(default=_as_in_5)
    training: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    lacks: Callable[[ModelConfig], Iterator[str]] = field(default=_has_all)
    table: Callable[[ModelConfig, MixtureNames, int, int], Iterator[Conversion]] = field(
        default=conversions
    )
    embedding: str = EMBEDDING
    spelt: Callable[[str], str | None] = field(default=_as_it_is)

    @property
    def names(self) -> MixtureNames:
        """How its experts are called, if it has any."""
        return self.experts or MixtureNames()

    def misfits(self, config: ModelConfig) -> list[str]:
        """Fields of a model that this family does not have, as `name=value`."""
        found = [
            f"{name}={getattr(config, name)!r}"
            for name, own in self.fixed.items()
            if getattr(config, name) != own
        ]
        if (config.num_experts is None) != (self.experts is None):
            found.append(f"num_experts={config.num_experts}")
        elif self.experts and not self.dense_layers and not all(config.expert_layers):
            found.append(f"moe_layer_freq={config.moe_layer_freq}")
        return [*found, *self.lacks(config)]


PLAIN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "linear_bias": False,
    "qkv_bias": False,
    "attention_bias": False,
    "output_bias": False,
    "qk_norm": False,
    "qk_norm_whole": False,
    "post_norm": False,
    "sliding_window": None,
    "rotary_fraction": 1.0,
}
"""Fields of a `ModelConfig` that tell Llama from other families."""

ROUTED: dict[str, Any] = {
    "shared_expert_ffn_hidden_size": None,
    "router_scores": "softmax",
    "router_pre_softmax": False,
    "router_scaling_factor": None,
    "router_groups": None,
    "router_bias_update_rate": None,
    "capacity_factor": None,
}
"""Fields of one that chooses the best experts by their logits, and drops no token."""

ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
"""Fields of Hugging Face of which one value can be expressed here, whatever the family."""


def but_for(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The fields without some, of which a family has any value."""
    return {name: value for name, value in fields.items() if name not in names}


def all_layers(theirs: Theirs, layers: int) -> Windows:
    """A window in every layer, if there is one."""
    return (theirs.get("sliding_window"),) * layers


def last_layers(theirs: Theirs, layers: int) -> Windows:
    """A window in the layers that are said to have one, or all but the first, if it is used."""
    if not theirs.get("use_sliding_window", False):
        return (None,) * layers
    width, first = theirs.get("sliding_window", 4096), theirs.get("max_window_layers", 28)
    kinds = theirs.get("layer_types") or [
        SLIDING if layer >= first else WHOLE for layer in range(layers)
    ]
    return tuple(width if kind == SLIDING else None for kind in kinds)


def all_layers_if_used(theirs: Theirs, layers: int) -> Windows:
    """A window in every layer, of a family that says besides whether it is used."""
    used = theirs.get("use_sliding_window", False)
    return (theirs.get("sliding_window", 4096) if used else None,) * layers
