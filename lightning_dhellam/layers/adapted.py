"""The adapter of a linear layer as operators, in both directions.

What the layer itself computes is added to in place, so no tensor is written twice. No further
collective carries hidden states: what is exchanged has as many channels as an adapter has ranks,
and that of a row-parallel layer is part of the partial sum which the layer scatters anyway.

    column   forward   down  gather | up          backward  up.dgrad  scatter | down.dgrad  wgrads
    row      forward   down  up | (scatter)       backward  (gather) | up.dgrad  down.dgrad  wgrads

In a column-parallel layer `down` reads this rank's tokens, before they are gathered, and its
gradient is a sum over them.

Shapes: S sequence, s = S / TP, B batch, I and O channels of this rank, R = P * r of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.protocols import LinearKernel
from lightning_dhellam.layers.adapter import Adapter
from lightning_dhellam.layers.rules import OF_TOKENS, on_tp, products
from lightning_dhellam.layers.writer import GraphWriter, main_grad
from lightning_dhellam.parallel.gradients import taken_first
from lightning_dhellam.plan.layout import Held, Rule

_WHOLE, _PARTIAL, _TOKENS = Held.REPLICATED, Held.PARTIAL, Held.SEQUENCE


@dataclass(frozen=True)
class Adapted:
    """What the adapters of both kinds of linear layers have.

    Attributes:
        name: of the linear layer.
        adapter: whose parameters are read, and their `main_grad` added to.
        along: what the channels are that tensor-parallel ranks share.
        kernel: what computes the GEMMs.
    """

    name: str
    adapter: Adapter
    along: Held
    kernel: LinearKernel

    @property
    def trains(self) -> bool:
        """Whether a gradient is wanted of any of its parameters."""
        return self.adapter.down.requires_grad or self.adapter.up.requires_grad

    @property
    def _low(self) -> str:
        """The slot of what `down` computes."""
        return f"{self.name}_low"

    @property
    def _channels(self) -> int:
        """The channels of what `down` computes, R."""
        return self.adapter.down.shape[0]

    def _down(self, w: GraphWriter, read: str, shares: int, rule: Rule) -> None:
        """Add the scaled product by `down`, of one in `shares` tokens."""
        forward, down, scale = self.kernel.forward, self.adapter.down, self.adapter.scale
        w.compute(
            f"{self.name}.lora.down",
            (read,),
            {self._low: w.sizes.wide(self._channels) / shares},
            lambda x: forward(x, down).mul_(scale),
            flops=2.0 * down.numel() / shares,
            moved=w.sizes.wide(down.shape[1]) / shares,
            rule=rule,
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
        down = self.adapter.down
        size = w.sizes.wide(down.shape[1]) / shares
        w.compute(
            f"{self.name}.lora.down.dgrad",
            (base, grad),
            {write: size},
            lambda dx, dh: _add_product(dx, dh, down),
            flops=2.0 * down.numel() / shares,
            moved=2 * size,
            takes=((write, base),),
            rule=rule,
        )

    def _down_wgrad(self, w: GraphWriter, grad: str, read: str, shares: int, rule: Rule) -> None:
        accumulate, down = self.kernel.accumulate_wgrad, self.adapter.down

        def run(dh: Tensor, x: Tensor) -> None:
            first = taken_first(down)
            accumulate(main_grad(down), dh, x, first=first)

        name, flops = f"{self.name}.lora.down.wgrad", 2.0 * down.numel() / shares
        self._wgrad(w, name, (grad, read), run, flops, down, rule)

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
        reads: tuple[str, str],
        run: Callable[[Tensor, Tensor], None],
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
