"""The router of a mixture of experts as operators. The mathematics is in `routing`.

    forward   gemm  choose  (drop)
    backward  count  (gather)  (losses)  choose.grad  dgrad  wgrad

Losses that balance experts belong to training, so all of them is in backward: how often each expert
was chosen, over the ranks that share a micro-batch, and from that a gradient by the logits and
values that are logged. Each token has a weight, its part of the global batch (`engine.weights`), so
that neither values nor gradients depend on the number of ranks; padding has none. Shapes: s tokens
of a sequence on this rank, B samples, N = s · B, E experts, k experts for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.layers import routing
from lightning_dhellam.layers.balancing import Balancing
from lightning_dhellam.layers.block import Setting, Supported, check_config
from lightning_dhellam.layers.routing import Routing
from lightning_dhellam.layers.rules import OF_TOKENS
from lightning_dhellam.layers.writer import GraphWriter, main_grad
from lightning_dhellam.parallel.gradients import taken_first

SUPPORTED: Supported = {
    "moe_enable_routing_replay": (False,),
    # Megatron-core's jitter acts in evaluation too, and draws from a generator.
    "moe_input_jitter_eps": (None,),
    "moe_router_dtype": (None, "fp32", "fp64"),
    "moe_router_force_load_balancing": (False,),
    "moe_router_padding_for_quantization": (False,),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_token_drop_policy": ("probs", "position"),
}
_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Router:
    """A Megatron-core `TopKRouter`, or one like it that mixes sparsely.

    Attributes:
        weight: [E, H]; it is read, and its `main_grad` is added to.
        bias: of the logits, [E]; or None.
        dtype: of the logits and of what they are computed from.
        routing: how experts are chosen.
        module: whose `expert_bias` [E] moves the choice, if it has one.
        balancing: counts and losses.
        factor: most tokens of an expert, in those of an even share; None without a limit.
        policy: which tokens are dropped beyond it.
    """

    weight: Parameter
    bias: Parameter | None
    dtype: torch.dtype
    routing: Routing
    module: Any = field(repr=False)
    balancing: Balancing
    factor: float | None
    policy: str

    @classmethod
    def of(cls, module: Any, setting: Setting) -> Router:
        """What lowers `module`; what it would compute otherwise is refused by name."""
        config, jitter = module.config, getattr(module, "jitter", None)
        if type(module) is not TopKRouter and not isinstance(jitter, float):
            raise ValueError(
                f"layer {setting.index}: its router is a {type(module).__name__}, which has no"
                " lowering: use Megatron-core's TopKRouter"
            )
        check_config(config, SUPPORTED)
        if config.moe_router_enable_expert_bias and config.moe_router_score_function != "sigmoid":
            raise ValueError(
                "TransformerConfig.moe_router_enable_expert_bias=True with"
                f" moe_router_score_function={config.moe_router_score_function!r} would have no"
                " effect: use 'sigmoid', or leave it at False"
            )
        rule = Routing.of(config, jitter)
        return cls(
            module.weight,
            module.bias,
            _DTYPES.get(config.moe_router_dtype, setting.sizes.dtype),
            rule,
            module,
            Balancing.of(config, rule, setting.index),
            config.moe_expert_capacity_factor,
            config.moe_token_drop_policy,
        )

    def forward(self, w: GraphWriter, read: str) -> None:
        """Add `probs` [N, k] and `chosen` [N, k] from hidden states [s, B, H].

        Weights are in fp32 or fp64. A choice that was dropped is E.
        """
        size = self.dtype.itemsize * self.routing.experts / w.sizes.tp
        w.compute(
            "router.gemm",
            (read,),
            {"router_logits": size},
            self._logits,
            flops=2 * self.weight.numel() / w.sizes.tp,
            moved=w.sizes.shard + size,
            rule=OF_TOKENS,
        )
        w.compute(
            "router.choose",
            ("router_logits",),
            {"probs": self._narrow(w, 4), self._selected: self._narrow(w, 8)},
            self._choose,
            moved=4 * size,
            rule=OF_TOKENS,
        )
        if self.factor is None:
            return

        def drop(probs: Tensor, selected: Tensor, padding: Tensor | None) -> Tensor:
            assert self.factor is not None
            return routing.drop(probs, selected, self.routing, self.factor, self.policy, padding)

        w.compute(
            "router.drop",
            ("probs", self._selected, "batch.padding"),
            {"chosen": self._narrow(w, 8)},
            drop,
            moved=3 * size,
            rule=OF_TOKENS,
        )

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add all gradients, from `grad` by the weights [N, k].

        Returns the slot of that by `read` [s, B, H], through the router alone.
        """
        size = self.dtype.itemsize * self.routing.experts / w.sizes.tp
        losses = self.balancing.backward(w, self._selected)
        dropped = () if self.factor is None else ("chosen",)
        w.compute(
            "router.choose.grad",
            ("router_logits", self._selected, grad, *losses, *dropped),
            {"d_router_logits": size},
            self._choose_grad,
            moved=(4 + len(losses)) * size,
            rule=OF_TOKENS,
        )
        w.compute(
            "router.dgrad",
            ("d_router_logits",),
            {f"d_{read}_router": w.sizes.shard},
            lambda dy: dy.matmul(self.weight.to(dy.dtype)).to(w.sizes.dtype),
            flops=2 * self.weight.numel() / w.sizes.tp,
            moved=w.sizes.shard + size,
            rule=OF_TOKENS,
        )
        self._weight_grad(w, read)
        return f"d_{read}_router"

    @property
    def _selected(self) -> str:
        """The slot of what was chosen before anything was dropped."""
        return "chosen" if self.factor is None else "selected"

    def _narrow(self, w: GraphWriter, itemsize: int) -> float:
        """Bytes per token of k numbers for each."""
        return itemsize * self.routing.chosen / w.sizes.tp

    def _logits(self, x: Tensor) -> Tensor:
        weight, bias, dtype = self.weight, self.bias, self.dtype
        if x.is_cuda and x.dtype is not dtype and dtype is torch.float32:
            # Products of 16-bit numbers are exact in fp32: nothing has to be copied for it.
            rows = torch.mm(x.flatten(0, 1), weight.t(), out_dtype=dtype)
            logits = rows.view(*x.shape[:2], -1)
        else:
            logits = x.to(dtype).matmul(weight.to(dtype).t())
        return logits if bias is None else logits + bias.to(dtype)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        bias = getattr(self.module, "expert_bias", None)
        return self.routing.forward(logits.flatten(0, 1), None if bias is None else bias.float())

    def _choose_grad(
        self, logits: Tensor, selected: Tensor, grad: Tensor, *losses: Tensor
    ) -> Tensor:
        if self.factor is not None:
            *losses, chosen = losses  # type: ignore[assignment]
            grad = grad.masked_fill(chosen == self.routing.experts, 0.0)
        d_logits = self.routing.backward(grad, logits.flatten(0, 1), selected).view_as(logits)
        for loss in losses:
            d_logits += loss
        return d_logits.to(logits.dtype)

    def _weight_grad(self, w: GraphWriter, read: str) -> None:
        """Add the gradients of weight and bias, unless they are frozen."""
        weight, bias = self.weight, self.bias
        if weight.requires_grad:

            def run(dy: Tensor, x: Tensor) -> None:
                rows, columns = dy.flatten(0, 1).t(), x.flatten(0, 1).to(dy.dtype)
                _add(weight, rows.matmul(columns))

            w.compute(
                "router.wgrad",
                ("d_router_logits", read),
                {},
                run,
                flops=2 * weight.numel() / w.sizes.tp,
                moved=3 * w.sizes.shard,
                accumulates=(weight,),
            )
        if bias is not None and bias.requires_grad:
            own = bias
            w.compute(
                "router.bias.grad",
                ("d_router_logits",),
                {},
                lambda dy: _add(own, dy.flatten(0, 1).sum(0)),
                accumulates=(own,),
            )


def _add(parameter: Parameter, grad: Tensor) -> None:
    """Add to the gradient of `parameter`; the first of a step overwrites what is there."""
    if taken_first(parameter):
        main_grad(parameter).copy_(grad)
    else:
        main_grad(parameter).add_(grad)
