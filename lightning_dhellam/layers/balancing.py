"""What keeps experts equally busy, as operators of backward: counts, losses, and their gradient.

    count  (gather over tp)  (gather over cp)  (gather over dp)  losses

Ranks gather each other's counts, a few numbers, and add them up themselves in the order of ranks,
so that all have the same bits. What is counted are the choices that were made, before any was
dropped: also where a bias or groups of experts move them, where Megatron-core counts others. Tokens
that are padding count nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.layers import routing
from lightning_dhellam.layers.routing import Routing
from lightning_dhellam.layers.rules import of_stream
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.parallel import collectives
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.tally import Tally
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.plan.layout import COMMUNICATORS, Held, Layout, Move, Rule

LOAD = "load"
"""What the tally calls the number of choices of each expert."""
SHRINKING = "z_loss"
"""The loss that keeps logits small."""
NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""What Megatron-core calls the losses of its kinds of load balancing in logs."""


@dataclass(frozen=True)
class Balancing:
    """The losses of one router.

    Attributes:
        routing: the router's choice.
        layer: number of the layer in the model.
        coefficients: of the losses of balance, by kind (`NAMES`).
        shrinking: coefficient of the z-loss.
    """

    routing: Routing
    layer: int
    coefficients: Mapping[str, float]
    shrinking: float

    @classmethod
    def of(cls, config: Any, rule: Routing, layer: int) -> Balancing:
        """The losses that a `TransformerConfig` asks for.

        Raises:
            ValueError: one of them is not known, or has no coefficient.
        """
        return cls(rule, layer, coefficients(config), float(config.moe_z_loss_coeff or 0.0))

    def backward(self, w: GraphWriter, selected: str) -> tuple[str, ...]:
        """Add counts and losses. Returns the slot of the gradient by the logits, if there is one.

        Args:
            w: of the graph of backward, which reads the slot `router_logits` [s, B, E].
            selected: the slot of the choices [N, k].
        """
        own, all_so_far = self._count(w, selected)
        size = 4.0 * self.routing.experts / w.sizes.tp
        if not self.coefficients and not self.shrinking:
            return ()
        reads, held = ["router_logits"], []
        if own:
            reads.append(own)
            held.append(self._gather(w, own, (Lane.TP, Lane.CP)))
        if all_so_far:
            reads.append(all_so_far)
            held.append(self._gather(w, all_so_far, (Lane.TP, Lane.CP, Lane.DP)))
        reads[1:] = [read for read, _ in held]
        w.compute(
            "router.losses",
            (*reads, "batch.padding", "batch.token_share", "batch.tally"),
            {"d_router_losses": size},
            partial(self._losses, bool(own)),
            moved=6 * size,
            rule=_of_tokens_and([layout for _, layout in held], of_stream(w.sizes.context)),
        )
        return ("d_router_losses",)

    def _count(self, w: GraphWriter, selected: str) -> tuple[str, str]:
        """Count choices. Returns the slots of this micro-batch's, and of all so far, if needed."""
        together = bool({"aux_loss", "seq_aux_loss"} & self.coefficients.keys())
        so_far = "global_aux_loss" in self.coefficients
        experts, layer = self.routing.experts, self.layer
        size = 4.0 * experts / w.sizes.length
        writes = {"router_counts": size} if together else {}
        if so_far:
            writes["router_counts_so_far"] = size

        def run(logits: Tensor, chosen: Tensor, padding: Tensor | None, tally: Tally) -> Any:
            counts = routing.counts(chosen, experts, logits.shape[1], padding)
            total = tally.add(LOAD, layer, counts.sum(0, keepdim=True))
            found = (counts,) * together + (total,) * so_far
            return found[0] if len(found) == 1 else found or None

        w.compute(
            "router.count",
            ("router_logits", selected, "batch.padding", "batch.tally"),
            writes,
            run,
            moved=4.0 * experts / w.sizes.tp,
            rule=Rule(sums=tuple(writes)),
        )
        return "router_counts" * together, "router_counts_so_far" * so_far

    def _gather(
        self, w: GraphWriter, read: str, lanes: tuple[Lane, ...]
    ) -> tuple[str, dict[str, Held]]:
        """Bring the counts of all ranks of `lanes`, each along a dimension of its own.

        Returns the slot, and how it lies.
        """
        held = dict.fromkeys(COMMUNICATORS, Held.PARTIAL)
        for lane in lanes:
            size = w.sizes.context.topology.size(lane)
            # Expert ranks are ranks of the others.
            reached = (lane.value, "ep") if lane is Lane.DP else (lane.value,)
            after = held | dict.fromkeys(reached, Held.REPLICATED)
            if size > 1:
                write = f"{read}_{lane}"
                bytes_ = w.bytes_per_token[read] * size
                moves = {name: Move(held[name], after[name]) for name in COMMUNICATORS}
                w.collective(
                    lane,
                    f"{read.replace('_', '.', 1)}.gather.{lane}",
                    (read,),
                    {write: bytes_},
                    _bring,
                    Collective.ALL_GATHER,
                    Rule(moves),
                    crossing=bytes_,
                )
                read, held = write, after
        return read, held

    def _losses(self, own: bool, logits: Tensor, *rest: Any) -> Tensor:
        *counts, padding, weight, tally = rest
        if padding is not None:
            weight = weight * padding.logical_not().unsqueeze(-1)
        counted = iter([c.reshape(-1, *c.shape[-2:]).sum(0) for c in counts])
        per_sample = next(counted) if own else None
        so_far = next(counted, None)
        wanted = []
        for kind in self.coefficients:
            found = so_far if kind == "global_aux_loss" else per_sample
            assert found is not None
            if kind == "aux_loss":
                found = found.sum(0, keepdim=True)
            # Of padding alone nothing is counted.
            wanted.append(found / found.sum(-1, keepdim=True).clamp_min(1.0))
        grad = torch.zeros((), device=logits.device)
        if wanted:
            factors = [*self.coefficients.values()]
            values, grad = routing.balance(self.routing.scores, logits, wanted, factors, weight)
            for kind, value in zip(self.coefficients, values, strict=True):
                tally.add(NAMES[kind], self.layer, value)
        if self.shrinking:
            value, by_logits = routing.shrink(logits, weight)
            tally.add(SHRINKING, self.layer, value)
            grad = grad + self.shrinking * by_logits
        return grad


def coefficients(config: Any) -> dict[str, float]:
    """The coefficients of a `TransformerConfig`'s losses of balance, by kind, without zeros.

    Raises:
        ValueError: a kind is not known, or the numbers of kinds and coefficients differ.
    """
    kinds, given = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    several = not isinstance(kinds, str)
    kinds = list(kinds) if several else [kinds]
    values = list(given) if isinstance(given, list | tuple) else [given]
    if len(kinds) != len(values):
        raise ValueError(
            f"TransformerConfig.moe_router_load_balancing_type={kinds} with"
            f" moe_aux_loss_coeff={given}: give one coefficient for each"
        )
    for kind in kinds:
        if kind not in (*NAMES, "none"):
            raise ValueError(
                f"TransformerConfig.moe_router_load_balancing_type={kind!r} cannot be lowered to"
                f" operators: use {' or '.join((*NAMES, 'none'))}"
            )
    if len(set(kinds)) < len(kinds):
        raise ValueError(
            f"TransformerConfig.moe_router_load_balancing_type={kinds} has a loss twice: add up"
            " their coefficients"
        )
    pairs = zip(kinds, values, strict=True)
    return {kind: float(value) for kind, value in pairs if kind != "none" and value}


def logged(config: Any) -> dict[str, int]:
    """The sums that the tally of a `TransformerConfig`'s routers has, and how many numbers each."""
    kinds = dict.fromkeys((NAMES[kind] for kind in coefficients(config)), 1)
    shrinking = {SHRINKING: 1} if config.moe_z_loss_coeff else {}
    return {LOAD: config.num_moe_experts} | kinds | shrinking


def _bring(communicator: Communicator, x: Tensor) -> collectives.Pending:
    return collectives.all_gather(communicator, x[None])


def _of_tokens_and(counts: list[dict[str, Held]], tokens: Layout) -> Rule:
    """The rule of what reads `tokens`, counts that lie so and padding, and writes for tokens."""
    elsewhere = (Held.REPLICATED, Held.REPLICATED)  # share and tally lie nowhere

    def move(name: str) -> Move:
        own = tokens.on(name)
        return Move((own, *(held[name] for held in counts), own, *elsewhere), own)

    return Rule({name: move(name) for name in COMMUNICATORS})
