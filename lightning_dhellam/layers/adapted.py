"""The adapter of a linear layer as operators, in both directions.

What the layer itself computes is added to in place, so no tensor is written twice. No further
collective carries hidden states: what is exchanged has as many channels as an adapter has ranks,
and that of a row-parallel layer is part of the partial sum which the layer scatters anyway.

    column   forward   down  gather | up          backward  up.dgrad  scatter | down.dgrad  wgrads
    row      forward   down  up | (scatter)       backward  (gather) | up.dgrad  down.dgrad  wgrads

In a column-parallel layer `down` reads this rank's tokens, before they are gathered, and its
gradient is a sum over them. Where elements of what `down` reads are dropped, the operators that
need the mask draw it each time anew: nothing more is saved.

Shapes: S sequence, s = S / TP, B batch, I and O channels of this rank, R = P * r of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.protocols import DropoutKernel, LinearKernel
from lightning_dhellam.layers.adapter import Adapter
from lightning_dhellam.layers.rules import DRAWS, DRAWS_OF_ALL, OF_TOKENS, drawing, on_tp, products
from lightning_dhellam.layers.writer import GraphWriter, main_grad
from lightning_dhellam.parallel.gradients import taken_first
from lightning_dhellam.plan.layout import CHANNELS, Held, Rule

SALTS = {"qkv": 4, "proj": 5, "fc1": 6, "fc2": 7}
"""Counters of the dropout before adapters: the sums of a layer and its attention have others."""

_WHOLE, _PARTIAL, _TOKENS = Held.REPLICATED, Held.PARTIAL, Held.SEQUENCE


@dataclass(frozen=True)
class Adapted:
    """What the adapters of both kinds of linear layers have.

    Attributes:
        name: of the linear layer.
        adapter: whose parameters are read, and their `main_grad` added to.
        along: what the channels are that tensor-parallel ranks share.
        kernel: what computes the GEMMs.
        dropout: what drops elements of the input.
        layer: the layer's number, which enters its random numbers.
    """

    name: str
    adapter: Adapter
    along: Held
    kernel: LinearKernel
    dropout: DropoutKernel
    layer: int

    @property
    def trains(self) -> bool:
        """Whether a gradient is wanted of any of its parameters."""
        return self.adapter.down.requires_grad or self.adapter.up.requires_grad

    @property
    def _passes(self) -> int:
        """How often an operator goes through what `down` reads: dropping it is two times more."""
        return 3 if self.adapter.dropout else 1

    @property
    def _low(self) -> str:
        """The slot of what `down` computes."""
        return f"{self.name}_low"

    @property
    def _channels(self) -> int:
        """The channels of what `down` computes, R."""
        return self.adapter.down.shape[0]

    @property
    def _draws(self) -> tuple[str, ...]:
        """What is read to know what is dropped, behind all else; nothing without dropout."""
        raise NotImplementedError

    def _drawn(self, rule: Rule, reads: int) -> Rule:
        """`rule` of an operator that knows what is dropped, besides what `reads` slots say."""
        raise NotImplementedError

    def _dropped(self, x: Tensor, key: int | None = None, places: Tensor | None = None) -> Tensor:
        """What `down` reads of its input, or the gradient by the input of that by what it read.

        `x` [..., I] has as many rows for each of `places`. In evaluation there is no key.
        """
        if key is None or places is None:
            return x
        adapter, dropout, width = self.adapter, self.dropout, x.shape[-1]
        rows = x.reshape(-1, width)
        batch = len(rows) // len(places)
        each = (places[:, None] * batch + torch.arange(batch, device=x.device)).flatten()
        own = dropout.derive_key(key, self.layer, SALTS[self.name])
        part = (adapter.place * width, adapter.ranks * width)
        return dropout.forward(rows, adapter.dropout, own, each, part).view(x.shape)

    def _down(self, w: GraphWriter, read: str, shares: int, rule: Rule) -> None:
        """Add the scaled product by `down`, of one in `shares` tokens."""
        forward, down, scale = self.kernel.forward, self.adapter.down, self.adapter.scale
        w.compute(
            f"{self.name}.lora.down",
            (read, *self._draws),
            {self._low: w.sizes.wide(self._channels) / shares},
            lambda x, *drawn: forward(self._dropped(x, *drawn), down).mul_(scale),
            flops=2.0 * down.numel() / shares,
            moved=self._passes * w.sizes.wide(down.shape[1]) / shares,
            rule=self._drawn(rule, 1),
        )

    def _up(self, w: GraphWriter, base: str, low: str, write: str, rule: Rule) -> None:
        """Add to `base` the product of `low` by `up`, in place."""
        adapter, channels = self.adapter, self.adapter.up.shape[0]
        size = w.sizes.wide(channels)
        w.compute(
            f"{self.name}.lora.up",
            (base, low),
            {write: size},
            lambda y, h: _add_product(y, h, adapter.spread().t()),
            flops=2.0 * channels * self._channels,
            moved=2 * size,
            takes=((write, base),),
            rule=rule,
        )

    def _up_dgrad(self, w: GraphWriter, grad: str, rule: Rule) -> str:
        """Add the scaled gradient by `low`. Returns its slot."""
        dgrad, adapter, channels = self.kernel.dgrad, self.adapter, self.adapter.up.shape[0]
        w.compute(
            f"{self.name}.lora.up.dgrad",
            (grad,),
            {f"d_{self._low}": w.sizes.wide(self._channels)},
            lambda dy: dgrad(dy, adapter.spread()).mul_(adapter.scale),
            flops=2.0 * channels * self._channels,
            moved=w.sizes.wide(channels),
            rule=rule,
        )
        return f"d_{self._low}"

    def _down_dgrad(
        self, w: GraphWriter, base: str, grad: str, write: str, shares: int, rule: Rule
    ) -> None:
        """Add to `base` the gradient by the input that comes through the adapter, in place."""
        down, dgrad = self.adapter.down, self.kernel.dgrad
        size = w.sizes.wide(down.shape[1]) / shares

        def run(
            dx: Tensor, dh: Tensor, key: int | None = None, places: Tensor | None = None
        ) -> Tensor:
            if key is None:
                return _add_product(dx, dh, down)
            return dx.add_(self._dropped(dgrad(dh, down), key, places).view(dx.shape))

        w.compute(
            f"{self.name}.lora.down.dgrad",
            (base, grad, *self._draws),
            {write: size},
            run,
            flops=2.0 * down.numel() / shares,
            moved=2 * self._passes * size,
            takes=((write, base),),
            rule=self._drawn(rule, 2),
        )

    def _down_wgrad(self, w: GraphWriter, grad: str, read: str, shares: int, rule: Rule) -> None:
        accumulate, down = self.kernel.accumulate_wgrad, self.adapter.down

        def run(dh: Tensor, x: Tensor, *drawn: Any) -> None:
            first = taken_first(down)
            accumulate(main_grad(down), dh, self._dropped(x, *drawn), first=first)

        name, flops = f"{self.name}.lora.down.wgrad", 2.0 * down.numel() / shares
        reads = (grad, read, *self._draws)
        self._wgrad(w, name, reads, run, flops, down, self._drawn(rule, 2))

    def _up_wgrad(self, w: GraphWriter, grad: str, low: str, rule: Rule) -> None:
        accumulate, adapter, up = self.kernel.accumulate_wgrad, self.adapter, self.adapter.up
        shape = up.shape[0], self._channels

        def run(dy: Tensor, h: Tensor) -> None:
            total = main_grad(up)
            of_all = total.new_empty(shape)
            accumulate(of_all, dy, h, first=True)
            total.add_(adapter.fold(of_all))

        name, flops = f"{self.name}.lora.up.wgrad", 2.0 * shape[0] * shape[1]
        self._wgrad(w, name, (grad, low), run, flops, up, rule)

    def _wgrad(
        self,
        w: GraphWriter,
        name: str,
        reads: tuple[str, ...],
        run: Callable[..., None],
        flops: float,
        parameter: Parameter,
        rule: Rule,
    ) -> None:
        if parameter.requires_grad:
            moved = w.sizes.wide(parameter.shape[0])
            w.compute(
                name, reads, {}, run, flops=flops, moved=moved, accumulates=(parameter,), rule=rule
            )


@dataclass(frozen=True)
class AdaptedColumn(Adapted):
    """The adapter of a column-parallel layer."""

    @property
    def _draws(self) -> tuple[str, ...]:
        return DRAWS if self.adapter.dropout else ()

    def _drawn(self, rule: Rule, reads: int) -> Rule:
        if not self.adapter.dropout:
            return rule
        return drawing(rule, reads, frozenset({Held.SEQUENCE}))

    def down(self, w: GraphWriter, read: str) -> None:
        """Add what `up` needs of `read` [s, B, I]."""
        self._down(w, read, w.sizes.tp, OF_TOKENS)
        w.gather(f"{self.name}.lora.gather", self._low, f"{self._low}_full", self._channels)

    def up(self, w: GraphWriter, base: str, write: str) -> None:
        """Add `write` [S, B, O], the sum of `base` and of what the adapter computes."""
        rule = on_tp((self.along, _WHOLE), self.along)
        self._up(w, base, self._low_whole(w), write, rule)

    def backward(self, w: GraphWriter, grad: str, read: str, base: str) -> str:
        """Add all gradients, from `grad` [S, B, O].

        Returns the slot of that by `read`, to which `base` adds the layer's own part.
        """
        low = self._up_dgrad(w, grad, products(self.along, _WHOLE))
        name, shares = f"{self.name}.lora.grad_scatter", w.sizes.tp
        low = w.scatter(name, low, f"{low}_part", self._channels)
        rule = on_tp((self.along, _WHOLE), gradient=self.along)
        self._up_wgrad(w, grad, self._low_whole(w), rule)
        write = f"{base}_adapted"
        self._down_dgrad(w, base, low, write, shares, OF_TOKENS)
        self._down_wgrad(w, low, read, shares, OF_TOKENS)
        return write

    def _low_whole(self, w: GraphWriter) -> str:
        return f"{self._low}_full" if w.sizes.tp > 1 else self._low


@dataclass(frozen=True)
class AdaptedRow(Adapted):
    """The adapter of a row-parallel layer."""

    @property
    def _draws(self) -> tuple[str, ...]:
        return DRAWS_OF_ALL if self.adapter.dropout else ()

    def _drawn(self, rule: Rule, reads: int) -> Rule:
        if not self.adapter.dropout:
            return rule
        return drawing(rule, reads, CHANNELS | {Held.SEQUENCE})

    def forward(self, w: GraphWriter, read: str, base: str, write: str) -> None:
        """Add `write` [S, B, O], this rank's part of the sum, of `base` and `read` [S, B, I]."""
        self._down(w, read, 1, products(self.along, _WHOLE))
        self._up(w, base, self._low, write, on_tp((_PARTIAL, _PARTIAL), _PARTIAL))

    def backward(self, w: GraphWriter, grad: str, read: str, base: str, write: str) -> None:
        """Add all gradients, from `grad` [S, B, O]: `write` is that by `read`, `base` included."""
        low = self._up_dgrad(w, grad, on_tp(_WHOLE))
        self._down_dgrad(w, base, low, write, 1, on_tp((self.along, _WHOLE), self.along))
        self._down_wgrad(w, low, read, 1, on_tp((_WHOLE, self.along), gradient=self.along))
        self._up_wgrad(w, grad, self._low, on_tp((_WHOLE, _PARTIAL), gradient=_PARTIAL))


def _add_product(y: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """`y` [..., N] plus `x` [..., M] times `matrix` [M, N], in the memory of `y`."""
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), matrix)
    return y
