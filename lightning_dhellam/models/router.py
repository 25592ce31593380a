"""Routers that Megatron-core does not have, as modules that its `MoELayer` takes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from lightning_dhellam.layers.routing import Routing, Scores


class SparseMixer(TopKRouter):
    """Chooses two experts one after the other, as Phi-3.5-MoE does (arXiv 2409.12136).

    The first is that of the largest logit. Its weight is its softmax among the experts whose logits
    are near enough; then it is put aside, and the second is chosen among the others alike. So the
    two weights do not add up to 1. As the published model computes it when it is not sampled:
    nothing is drawn, and gradients are those of the two softmaxes.

    Args:
        jitter: half of how far below the best a logit may lie, as a part of the larger of the two
            magnitudes.
        options: of a `TopKRouter`, whose weight it has.
    """

    def __init__(self, *, jitter: float, **options: Any) -> None:
        super().__init__(**options)
        self.jitter = jitter

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and map of the experts of each token, [tokens, experts] both.

        ``logits`` [S, B, experts]; ``padding_mask`` must be None.
        """
        assert padding_mask is None
        length, batch = logits.shape[:2]
        logits = self.apply_z_loss(logits.view(-1, logits.shape[-1]))
        experts = logits.shape[-1]
        mixing = Routing(experts, self.topk, Scores.SPARSEMIXER, jitter=self.jitter)
        weights, chosen = mixing.forward(logits)
        probs = torch.zeros_like(logits).scatter(1, chosen, weights.type_as(logits))
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            counted, scores = compute_routing_scores_for_aux_loss(logits, self.topk, "softmax")
            probs = self._apply_aux_loss(probs, scores, counted)
            probs = self._apply_seq_aux_loss(probs, scores, counted, length, batch)
            probs = self._apply_global_aux_loss(probs, scores, counted)
        return probs, routing_map
