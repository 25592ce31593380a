"""Which experts a token goes to and with what weights: the mathematics of routers, on tensors.

Forward and backward stand side by side, and nothing is kept between them but logits and choices.
Shapes: N tokens, E experts, k experts for each token. All is computed in fp32, or in fp64 where
logits are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-20
"""Added to sums that are divided by, as Megatron-core and DeepSeek-V3 do."""


class Scores(StrEnum):
    """How logits become weights: `SPARSEMIXER` as in Phi-3.5-MoE (arXiv 2409.12136)."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SPARSEMIXER = "sparsemixer"


@dataclass(frozen=True)
class Routing:
    """The choice of experts and their weights.

    Attributes:
        experts: number E of experts.
        chosen: number k of experts that each token goes to.
        scores: how logits become weights.
        over_all: softmax is taken over all experts, and not over those that were chosen.
        factor: multiplies the weights.
        groups: number of equal groups of experts of which a token goes to a few only; or None.
        chosen_groups: of those how many; a group counts as much as its best k / chosen_groups
            experts together, and at least its best one.
        jitter: of `sparsemixer`: half of how far below the best logit others count, as a part of
            the larger magnitude.
    """

    experts: int
    chosen: int
    scores: Scores = Scores.SOFTMAX
    over_all: bool = False
    factor: float = 1.0
    groups: int | None = None
    chosen_groups: int | None = None
    jitter: float = 0.0

    @classmethod
    def of(cls, config: Any, jitter: float | None = None) -> Routing:
        """What a `TransformerConfig` says. With a `jitter` scores are those of the sparsemixer.

        Raises:
            ValueError: the groups do not fit the experts, or have too few for a token.
        """
        groups, chosen_groups = config.moe_router_num_groups, config.moe_router_group_topk
        if groups and not chosen_groups:
            groups = None  # as Megatron-core takes it
        experts, chosen = config.num_moe_experts, config.moe_router_topk
        if chosen_groups:
            _check_groups(experts, chosen, groups, chosen_groups)
        scores = Scores(config.moe_router_score_function)
        return cls(
            experts,
            chosen,
            scores if jitter is None else Scores.SPARSEMIXER,
            bool(config.moe_router_pre_softmax),
            config.moe_router_topk_scaling_factor or 1.0,
            groups,
            chosen_groups or None,
            jitter or 0.0,
        )

    def forward(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [N, k] and numbers [N, k] int64 of the experts of each token.

        Args:
            logits: [N, E].
            bias: [E], is added to sigmoid scores where experts are chosen, and changes no weight.
        """
        logits = _wide(logits)
        if self.scores is Scores.SPARSEMIXER:
            return self._mix(logits)
        if self.scores is Scores.SOFTMAX:
            scores = logits.softmax(-1) if self.over_all else logits
            weights, chosen = self._best(scores)
            weights = weights if self.over_all else weights.softmax(-1)
        else:
            scores = logits.sigmoid()
            _, chosen = self._best(scores if bias is None else scores + bias)
            weights = scores.gather(1, chosen)
            if self.chosen > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        return weights * self.factor, chosen

    def backward(self, d_weights: Tensor, logits: Tensor, chosen: Tensor) -> Tensor:
        """Gradient by `logits` [N, E], in fp32 or fp64, from that by the weights [N, k].

        Args:
            d_weights: [N, k].
            logits: as `forward` was given.
            chosen: as `forward` has returned.
        """
        logits = _wide(logits)
        d_weights = d_weights.to(logits.dtype) * self.factor
        if self.scores is Scores.SPARSEMIXER:
            return self._mix_backward(d_weights, logits, chosen)
        if self.scores is Scores.SOFTMAX and self.over_all:
            d_scores = torch.zeros_like(logits).scatter_(1, chosen, d_weights)
            return _softmax_backward(d_scores, logits.softmax(-1))
        picked = logits.gather(1, chosen)
        if self.scores is Scores.SOFTMAX:
            d_picked = _softmax_backward(d_weights, picked.softmax(-1))
        else:
            d_picked = _sigmoid_backward(d_weights, picked, normalised=self.chosen > 1)
        return torch.zeros_like(logits).scatter_(1, chosen, d_picked)

    def _best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest scores of each token, of its best groups only if there are groups."""
        if self.groups is None or self.chosen_groups is None:
            return scores.topk(self.chosen, dim=-1)
        of_groups = scores.unflatten(1, (self.groups, -1))
        # With more groups than experts of a token the quotient is 0, and no group the better one.
        best = of_groups.topk(max(1, self.chosen // self.chosen_groups), dim=-1).values.sum(-1)
        kept = best.topk(self.chosen_groups, dim=-1).indices
        others = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        left = of_groups.masked_fill(others[..., None], -torch.inf).flatten(1)
        return left.topk(self.chosen, dim=-1)

    def _mix(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        left, weights, numbers = logits, [], []
        for _ in range(self.chosen):
            best = left.argmax(-1, keepdim=True)
            weights.append(self._near(left, logits, best).gather(1, best))
            numbers.append(best)
            left = left.scatter(1, best, -torch.inf)
        return torch.cat(weights, 1) * self.factor, torch.cat(numbers, 1)

    def _mix_backward(self, d_weights: Tensor, logits: Tensor, chosen: Tensor) -> Tensor:
        left, d_logits = logits, torch.zeros_like(logits)
        for d_weight, best in zip(d_weights.split(1, 1), chosen.split(1, 1), strict=True):
            shares = self._near(left, logits, best)
            d_shares = torch.zeros_like(logits).scatter_(1, best, d_weight)
            d_logits += _softmax_backward(d_shares, shares)
            left = left.scatter(1, best, -torch.inf)
        return d_logits

    def _near(self, left: Tensor, logits: Tensor, best: Tensor) -> Tensor:
        """The softmax over those that are `left` and not too far below the `best` of them."""
        top = logits.gather(1, best)
        far = (top - logits) / logits.abs().maximum(top) > 2 * self.jitter
        return left.masked_fill(far, -torch.inf).softmax(-1)


def capacity(tokens: int, routing: Routing, factor: float) -> int:
    """Tokens that an expert takes at most: `factor` times its even share."""
    return math.ceil(tokens * routing.chosen / routing.experts * factor)


def drop(
    weights: Tensor,
    chosen: Tensor,
    routing: Routing,
    factor: float,
    policy: str,
    padding: Tensor | None = None,
) -> Tensor:
    """`chosen` [N, k] with E for every choice beyond the tokens that an expert takes.

    Args:
        weights: [N, k].
        chosen: [N, k].
        routing: the router's choice.
        factor: tokens that an expert takes at most, in those of an even share.
        policy: those of least weight are dropped (`probs`), or the last ones (`position`).
        padding: which tokens take no place and are dropped, with N elements; None if there is none.
    """
    tokens, experts = len(chosen), routing.experts
    most = capacity(tokens, routing, factor)
    if padding is None and most >= tokens:
        return chosen
    limit: int | Tensor = most
    if padding is not None:
        padding = padding.view(-1, 1)
        # As `capacity`, of a number that the host does not know.
        share = (tokens - padding.sum()).double() * routing.chosen / experts
        limit = (share * factor).ceil()
    if policy == "position":
        taken = torch.zeros(tokens, experts, dtype=torch.int32, device=chosen.device)
        taken.scatter_(1, chosen, 1)
        if padding is not None:
            taken.masked_fill_(padding, 0)
        kept = taken.cumsum(0) <= limit
    else:
        # What was not chosen comes after what was, even with a weight of 0.
        every = weights.new_full((tokens, experts), -1.0).scatter_(1, chosen, weights)
        if padding is not None:
            every.masked_fill_(padding, -1.0)
        first = every.topk(min(most, tokens), dim=0).indices
        within = torch.arange(len(first), device=first.device)[:, None] < limit
        kept = torch.zeros_like(every, dtype=torch.bool)
        kept.scatter_(0, first, within.expand_as(first))
    if padding is not None:
        kept.masked_fill_(padding, False)
    return chosen.where(kept.gather(1, chosen), experts)


def counts(chosen: Tensor, experts: int, samples: int, padding: Tensor | None = None) -> Tensor:
    """How often each expert was chosen by each sample's tokens: [samples, E] in fp32.

    `chosen` [N, k] holds the tokens of all samples at one position, then those at the next.
    `padding`, with N elements, says which tokens do not count.
    """
    every = torch.zeros(len(chosen), experts, device=chosen.device).scatter_(1, chosen, 1.0)
    if padding is not None:
        every.masked_fill_(padding.view(-1, 1), 0.0)
    return every.view(-1, samples, experts).sum(0)


def balance(
    scores: Scores,
    logits: Tensor,
    wanted: Sequence[Tensor],
    coefficients: Sequence[float],
    weight: Tensor | float,
) -> tuple[list[Tensor], Tensor]:
    """Losses of balance, each a scalar, and the gradient of their sum by `logits` [S, B, E].

    Each is E times the sum of f · P over tokens and experts, where P are the scores of a token over
    all experts, with a sum of 1, times its `weight`, and f is the part of choices that an expert
    has (Switch Transformer, arXiv 2101.03961).

    Args:
        scores: how logits become scores; those of the sparsemixer are a softmax.
        logits: [S, B, E].
        wanted: f of each loss, [B, E] or [1, E], which is constant.
        coefficients: of each loss in the sum; what is returned of a loss is without.
        weight: of each token, [S, B, 1] or one for all.
    """
    logits = _wide(logits)
    sigmoid = scores is Scores.SIGMOID
    raw = logits.sigmoid() if sigmoid else logits
    whole = raw / (raw.sum(-1, keepdim=True) + _TINY) if sigmoid else raw.softmax(-1)
    weight = weight * logits.shape[-1]
    per_sample = (whole * weight).sum(0)
    values = [(per_sample * f).sum() for f in wanted]
    parts = [f * c for f, c in zip(wanted, coefficients, strict=True)]
    pull = reduce(torch.add, parts) * weight
    if sigmoid:
        return values, _sigmoid_backward(pull, logits, normalised=True)
    return values, _softmax_backward(pull, whole)


def shrink(logits: Tensor, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """The z-loss (ST-MoE, arXiv 2202.08906), and its gradient by `logits` [S, B, E].

    It is the sum over tokens of the squared logsumexp of their logits times their `weight`,
    [S, B, 1] or one for all.
    """
    logits = _wide(logits)
    sums = logits.logsumexp(-1, keepdim=True)
    return (sums.square() * weight).sum(), 2 * weight * sums * (logits - sums).exp()


def stepped_bias(bias: Tensor, chosen: Tensor, rate: float) -> Tensor:
    """The bias after a step: up for an expert that was `chosen` [E] less than the mean, or down.

    See arXiv 2408.15664.
    """
    return bias + (chosen.mean() - chosen).sign().to(bias.dtype) * rate


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _softmax_backward(d_shares: Tensor, shares: Tensor) -> Tensor:
    return shares * (d_shares - (d_shares * shares).sum(-1, keepdim=True))


def _sigmoid_backward(d_weights: Tensor, logits: Tensor, *, normalised: bool) -> Tensor:
    """Gradient by `logits` from that by their sigmoids, or by the sigmoids' parts of their sum."""
    scores = logits.sigmoid()
    if normalised:
        total = scores.sum(-1, keepdim=True) + _TINY
        mean = (d_weights * scores).sum(-1, keepdim=True) / total
        d_weights = (d_weights - mean) / total
    return d_weights * scores * (1 - scores)


def _check_groups(experts: int, chosen: int, groups: int | None, chosen_groups: int) -> None:
    if not groups or experts % groups or chosen_groups > groups:
        raise ValueError(
            f"moe_router_num_groups={groups} with moe_router_group_topk={chosen_groups} and"
            f" num_moe_experts={experts}: give a divisor of the number of experts that is at least"
            " moe_router_group_topk"
        )
    if chosen > chosen_groups * (experts // groups):
        raise ValueError(
            f"moe_router_topk={chosen} is more than the {chosen_groups * (experts // groups)}"
            f" experts of moe_router_group_topk={chosen_groups} groups: raise moe_router_group_topk"
        )
