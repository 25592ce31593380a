"""A mixture of experts as operators: each token goes through the few MLPs that it chooses.

    forward   router  order  permute  (shared)  dispatch  fc1  act  fc2  combine  (join)
    backward  (gate)  combine  fc2  act  fc1  dispatch  router  (shared)  join

The routing weight multiplies what the activation gives, in fp32 (and the bias of the second layer),
as in Megatron-core. Where tensor-parallel ranks share each expert, tokens are gathered before they
are dispatched, and results are scattered after they are combined. `dispatch` has the way of the
tokens; R are the rows that arrive at this rank's L experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.layers.block import Setting, Supported, check_class, check_config
from lightning_dhellam.layers.dispatch import Dispatch
from lightning_dhellam.layers.expert_mlp import ExpertMlp
from lightning_dhellam.layers.router import Router
from lightning_dhellam.layers.rules import gathers, scatters
from lightning_dhellam.layers.shared_expert import SharedExpert
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.parallel import collectives
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.plan.layout import Held

SUPPORTED: Supported = {
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_pad_expert_input_to_capacity": (False,),
}

_GROUPED = ("GroupedMLP", "InferenceGroupedMLP", "TEGroupedMLP")
"""Megatron-core's experts whose weights are one parameter of a library of grouped GEMMs."""


@dataclass(frozen=True)
class Experts:
    """A Megatron-core `MoELayer`.

    Attributes:
        router: chooses experts for each token.
        dispatch: brings tokens to experts, and results back.
        mlp: the experts of this rank.
        shared: an expert of all tokens, or None.
    """

    router: Router
    dispatch: Dispatch
    mlp: ExpertMlp
    shared: SharedExpert | None

    @classmethod
    def of(cls, module: Any, setting: Setting) -> Experts:
        """What lowers `module`; what it would compute otherwise is refused by name."""
        config = module.config
        if setting.eight is not None:
            setting.eight.refuse_experts(setting.index)
        check_config(config, SUPPORTED)
        _check_experts(module.experts, setting.index)
        communicator = setting.sizes.context.communicators[Lane.EP]
        dispatch = Dispatch(
            config.num_moe_experts,
            config.moe_router_topk,
            config.hidden_size,
            setting.sizes.context.topology.etp_size > 1,
            setting.kernels,
            communicator.size,
            communicator.rank,
        )
        shared = module.shared_experts
        return cls(
            Router.of(module.router, setting),
            dispatch,
            ExpertMlp.of(module.experts.local_experts, setting, dispatch),
            None if shared is None else SharedExpert.of(shared, setting),
        )

    @property
    def output(self) -> str:
        """The name of the result."""
        return "mixture"

    @property
    def bias(self) -> Parameter | None:
        """Nothing is left to add: each expert adds its own bias."""
        return None

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the operators of forward. Returns the slot of the result [s, B, hidden]."""
        self.router.forward(w, read)
        whole, probs, chosen = self._brought(w, read)
        rows = self.dispatch.forward(w, whole, probs, chosen)
        # Between the count of the rows and the wait for it, so that the device has work meanwhile.
        beside = None if self.shared is None else self.shared.forward(w, read)
        self.dispatch.exchange(w)
        found = self.mlp.forward(w, rows)
        routed = "routed" if beside else self.output
        if self.dispatch.shared:
            self.dispatch.combine(w, found, "routed_partial")
            w.scatter("experts.scatter", "routed_partial", routed, w.sizes.hidden)
        else:
            self.dispatch.combine(w, found, routed)
        if beside is not None:
            self._add(w, "experts.join", (routed, beside), self.output)
        return self.output

    def written(self, w: GraphWriter) -> str:
        """The slot of the result that `forward` returned."""
        return self.output

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add the operators of backward. Returns the slot of the gradient by `read`."""
        by_routed, written = f"d_{read}_routed", f"d_{read}_mixture"
        if self.dispatch.shared:
            channels = w.sizes.hidden
            whole = w.gather("experts.grad_gather", grad, f"d_{self.output}_whole", channels)
            self._to_experts_and_back(w, whole, (f"{by_routed}_partial", "d_probs_partial"))
            w.scatter("experts.grad_scatter", f"{by_routed}_partial", by_routed, channels)
            self._scatter_probs(w)
        else:
            self._to_experts_and_back(w, grad, (by_routed, "d_probs"))
        parts = [by_routed, self.router.backward(w, "d_probs", read)]
        if self.shared is not None:
            parts.append(self.shared.backward(w, grad, read))
        self._add(w, "experts.join.grad", tuple(parts), written)
        return written

    def _to_experts_and_back(self, w: GraphWriter, grad: str, writes: tuple[str, str]) -> None:
        self.dispatch.combine_grad(w, grad, "d_experts_found")
        by_rows, by_weights = self.mlp.backward(w, "d_experts_found", self.dispatch.ordered)
        self.dispatch.backward(w, by_rows, by_weights, *writes)

    def _brought(self, w: GraphWriter, read: str) -> tuple[str, str, str]:
        """The slots of all tokens that this rank brings, of their weights and their experts."""
        if not self.dispatch.shared:
            return read, "probs", "chosen"
        whole = w.gather("experts.gather", read, f"{read}_whole", w.sizes.hidden)
        writes = {"probs_whole": 4.0 * self.dispatch.chosen, "chosen_whole": 8.0}
        w.collective(
            Lane.TP,
            "experts.choices.gather",
            ("probs", "chosen"),
            writes,
            collectives.all_gather,
            Collective.ALL_GATHER,
            gathers(Lane.TP, Held.SEQUENCE),
            crossing=sum(writes.values()),
        )
        return whole, "probs_whole", "chosen_whole"

    def _scatter_probs(self, w: GraphWriter) -> None:
        size = 4.0 * self.dispatch.chosen
        w.collective(
            Lane.TP,
            "experts.probs.grad_scatter",
            ("d_probs_partial",),
            {"d_probs": size / w.sizes.tp},
            collectives.reduce_scatter,
            Collective.REDUCE_SCATTER,
            scatters(Lane.TP, Held.SEQUENCE),
            crossing=size,
        )

    def _add(self, w: GraphWriter, name: str, parts: tuple[str, ...], write: str) -> None:
        moved = (len(parts) + 1) * w.sizes.shard
        w.compute(name, parts, {write: w.sizes.shard}, _sum, moved=moved)


def _check_experts(experts: Any, index: int) -> None:
    """Refuse experts whose weights have no lowering."""
    name = type(experts).__name__
    if name in _GROUPED:
        raise ValueError(
            f"layer {index}: its experts are a {name}, which has no lowering: build the layer with"
            " Megatron-core's SequentialMLP (get_moe_module_spec(moe_grouped_gemm=False)); the"
            " GEMMs of all experts are grouped all the same"
        )
    check_class(experts, SequentialMLP, "experts", index)


def _sum(first: Tensor, *others: Tensor) -> Tensor:
    total = first + others[0]
    for other in others[1:]:
        total += other
    return total
