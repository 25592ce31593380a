"""The part of a model's shape that a mixture of experts adds, checked and translated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

_KINDS = {
    "router_scores": ("softmax", "sigmoid", "sparsemixer"),
    "aux_loss": ("aux_loss", "seq_aux_loss", "global_aux_loss"),
    "drop_policy": ("probs", "position"),
}
_FACTORS = ("router_scaling_factor", "capacity_factor")
_COEFFICIENTS = ("aux_loss_coefficient", "z_loss_coefficient", "router_bias_update_rate")


@dataclass(frozen=True, kw_only=True)
class ExpertFields:
    """What a `ModelConfig` says of its experts; all of it may be left out of a dense model."""

    num_experts: int | None = None
    """Number of experts of a layer; left out, all layers are dense."""

    experts_per_token: int = 2
    """Number of experts that each token goes to."""

    expert_ffn_hidden_size: int | None = None
    """Width of one expert; ffn_hidden_size, which is that of dense layers, when left out."""

    shared_expert_ffn_hidden_size: int | None = None
    """Width of all shared experts together, through which every token goes; none when left out."""

    moe_layer_freq: int | tuple[int, ...] = 1
    """Which layers have experts: every n-th from the first, or a list of a 1 (experts) or a 0
    (dense) for each layer."""

    router_scores: str = "softmax"
    """How the router's logits become routing weights: `softmax`, `sigmoid`, or `sparsemixer`, that
    of Phi-3.5-MoE, which chooses two experts one after the other (arXiv 2409.12136)."""

    router_pre_softmax: bool = False
    """Whether softmax is taken over all experts, so that the weights of those that are chosen do
    not add up to 1 (Hugging Face: norm_topk_prob of false), or over those that are chosen."""

    router_scaling_factor: float | None = None
    """Multiplies the routing weights."""

    router_groups: int | None = None
    """Number of groups of experts of which a token goes to a few only; no groups when left out."""

    router_groups_per_token: int | None = None
    """Number of groups of experts that a token may go to."""

    router_bias_update_rate: float | None = None
    """By how much, once a step, a bias of each expert follows its load, which balances experts
    without a loss; with `sigmoid` only. 0 keeps biases as they are, as when a model is tuned. No
    bias when left out."""

    router_jitter: float = 0.01
    """Of `sparsemixer`: experts whose logits are below the best by more than twice this part of
    it take no share of the routing weight."""

    router_fp32: bool = True
    """Whether the router computes in fp32; or else in the type of activations."""

    aux_loss: str = "aux_loss"
    """Over what the loss that balances experts is taken: a micro-batch (`aux_loss`), each sequence
    (`seq_aux_loss`), or all ranks' tokens (`global_aux_loss`)."""

    aux_loss_coefficient: float = 0.0
    """Multiplies the loss that balances experts, of each layer by itself, which is 1 where experts
    are used evenly, as in Megatron-core. Hugging Face has one loss of all layers together, which is
    `experts_per_token` where they are: its router_aux_loss_coef times `experts_per_token`, over the
    number of layers with experts, pulls as hard here."""

    z_loss_coefficient: float = 0.0
    """Multiplies the loss that keeps the router's logits small."""

    capacity_factor: float | None = None
    """How many tokens an expert takes at most: this times an even share, of the tokens of one
    micro-batch on one rank, as in Megatron-core. Which tokens are dropped therefore depends on
    parallel sizes and micro-batch size, and so do loss and gradients, also in evaluation and
    prediction, which drop as well. Padding takes no place. No token is dropped when left out."""

    drop_policy: str = "probs"
    """Which tokens an expert drops beyond its capacity: those of least weight (`probs`), or the
    last ones (`position`)."""

    def layers_with_experts(self, num_layers: int) -> tuple[bool, ...]:
        """Whether each of `num_layers` layers has experts."""
        if self.num_experts is None:
            return (False,) * num_layers
        if isinstance(self.moe_layer_freq, int):
            return tuple(index % self.moe_layer_freq == 0 for index in range(num_layers))
        return tuple(map(bool, self.moe_layer_freq))

    def check_experts(self, num_layers: int) -> None:
        """Refuse, with ValueError, values that do not fit together."""
        if self.num_experts is None:
            self._check_dense()
            return
        for name, known in _KINDS.items():
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use {choices}")
        for name in _FACTORS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0; or leave it out")
        for name in _COEFFICIENTS:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} exceeds"
                f" num_experts={self.num_experts}: a token goes to each expert once at most"
            )
        self._check_layers(num_layers)
        self._check_router()
        self._check_groups()

    def expert_fields(self, num_layers: int, width: int) -> dict[str, Any]:
        """The fields of Megatron-core's TransformerConfig that say the same.

        Args:
            num_layers: of the model.
            width: of one expert.
        """
        if self.num_experts is None:
            return {}
        balanced = self.aux_loss_coefficient > 0
        return {
            "num_moe_experts": self.num_experts,
            "moe_router_topk": self.experts_per_token,
            "moe_ffn_hidden_size": width,
            "moe_shared_expert_intermediate_size": self.shared_expert_ffn_hidden_size,
            "moe_layer_freq": [int(here) for here in self.layers_with_experts(num_layers)],
            "moe_router_score_function": (
                "sigmoid" if self.router_scores == "sigmoid" else "softmax"
            ),
            "moe_router_pre_softmax": self.router_pre_softmax,
            "moe_router_topk_scaling_factor": self.router_scaling_factor,
            "moe_router_num_groups": self.router_groups,
            "moe_router_group_topk": self.router_groups_per_token,
            "moe_router_enable_expert_bias": self.router_bias_update_rate is not None,
            "moe_router_bias_update_rate": self.router_bias_update_rate or 0.0,
            "moe_router_dtype": "fp32" if self.router_fp32 else None,
            "moe_router_load_balancing_type": self.aux_loss if balanced else "none",
            "moe_aux_loss_coeff": self.aux_loss_coefficient,
            "moe_z_loss_coeff": self.z_loss_coefficient or None,
            "moe_expert_capacity_factor": self.capacity_factor,
            "moe_token_drop_policy": self.drop_policy,
            # The one that works where ranks have different numbers of rows, for plain autograd.
            "moe_token_dispatcher_type": "alltoall",
        }

    def _check_dense(self) -> None:
        for field in fields(ExpertFields):
            value = getattr(self, field.name)
            if value != field.default:
                raise ValueError(
                    f"{field.name}={value!r} without num_experts: a dense model has no experts;"
                    " give num_experts, or leave it out"
                )

    def _check_layers(self, num_layers: int) -> None:
        freq = self.moe_layer_freq
        if isinstance(freq, int):
            if freq < 1:
                raise ValueError(f"moe_layer_freq={freq} must be at least 1, or a list of 1 and 0")
            return
        shown = f"moe_layer_freq={list(freq)}"
        if len(freq) != num_layers:
            raise ValueError(
                f"{shown} is of {len(freq)} layers, but num_layers={num_layers}: give a 1 (experts)"
                " or a 0 (dense) for each layer"
            )
        if not set(freq) <= {0, 1}:
            raise ValueError(f"{shown}: give a 1 (experts) or a 0 (dense) for each layer")
        if not any(freq):
            raise ValueError(f"{shown} leaves no layer with experts: leave num_experts out instead")

    def _check_router(self) -> None:
        scores = self.router_scores
        if scores != "softmax" and self.router_pre_softmax:
            raise ValueError(
                f"router_pre_softmax=True with router_scores={scores!r}: there is no softmax over"
                " all experts; leave it out"
            )
        if scores == "softmax" and self.experts_per_token == 1 and not self.router_pre_softmax:
            raise ValueError(
                "experts_per_token=1 with router_pre_softmax=False gives every token the weight 1,"
                " so that the router is not trained: set router_pre_softmax=True"
            )
        if scores != "sigmoid" and self.router_bias_update_rate is not None:
            raise ValueError(
                f"router_bias_update_rate={self.router_bias_update_rate} with"
                f" router_scores={scores!r}: only 'sigmoid' has a bias for balancing"
            )
        if scores != "sparsemixer":
            return
        if self.experts_per_token != 2:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} with router_scores='sparsemixer',"
                " which chooses two: leave it at 2"
            )
        if not 0 < self.router_jitter < 1:
            raise ValueError(f"router_jitter={self.router_jitter} must be between 0 and 1")
        for name in ("router_scaling_factor", "router_groups", "capacity_factor"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} with router_scores='sparsemixer', which has"
                    " none: leave it out"
                )

    def _check_groups(self) -> None:
        groups, chosen = self.router_groups, self.router_groups_per_token
        if (groups is None) != (chosen is None):
            given, missing = "router_groups", "router_groups_per_token"
            if groups is None:
                given, missing = missing, given
            raise ValueError(f"{given}={getattr(self, given)} without {missing}: give both")
        if groups is None or chosen is None:
            return
        assert self.num_experts is not None
        if self.num_experts % groups:
            raise ValueError(
                f"num_experts={self.num_experts} is not a multiple of router_groups={groups}: every"
                " group has as many experts"
            )
        if chosen > groups:
            raise ValueError(f"router_groups_per_token={chosen} exceeds router_groups={groups}")
        # Megatron-core ranks a group by its best topk // groups experts, which would be none.
        if chosen > self.experts_per_token:
            raise ValueError(
                f"router_groups_per_token={chosen} exceeds"
                f" experts_per_token={self.experts_per_token}: a token would have groups without"
                " an expert of its own; lower it"
            )
        if self.experts_per_token > chosen * (self.num_experts // groups):
            raise ValueError(
                f"experts_per_token={self.experts_per_token} exceeds the"
                f" {chosen * (self.num_experts // groups)} experts of"
                f" router_groups_per_token={chosen}: raise it"
            )


def check_expert_shares(
    config: ExpertFields, width: int, expert_parallel_size: int, expert_tensor_parallel_size: int
) -> None:
    """Refuse, with ValueError, experts of `width` that cannot be cut over so many ranks."""
    if config.num_experts is None:
        if expert_parallel_size > 1:
            raise ValueError(
                f"expert_parallel_size={expert_parallel_size}, but the model has no experts: leave"
                " it at 1, or give num_experts"
            )
        return
    if config.num_experts % expert_parallel_size:
        raise ValueError(
            f"num_experts={config.num_experts} is not a multiple of"
            f" expert_parallel_size={expert_parallel_size}: every rank holds as many experts; use"
            f" one of {', '.join(map(str, _divisors(config.num_experts)))}"
        )
    if width % expert_tensor_parallel_size:
        own = config.expert_ffn_hidden_size is not None
        name = "expert_ffn_hidden_size" if own else "ffn_hidden_size"
        raise ValueError(
            f"{name}={width} is not a multiple of"
            f" expert_tensor_parallel_size={expert_tensor_parallel_size}: every rank holds an equal"
            f" share of each expert; set expert_tensor_parallel_size=1 or change {name}"
        )


def as_kept(value: Any) -> Any:
    """A value as people write it, a list for instance, as an immutable configuration keeps it."""
    return tuple(value) if isinstance(value, Sequence) else value


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
