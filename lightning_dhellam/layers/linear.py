"""Column- and row-parallel linear layers as operators, in both directions.

Activations between linear layers are split along the sequence where TP > 1, so a column-parallel
layer gathers its input and a row-parallel layer scatters its output:

    column   forward   gather  gemm               backward  dgrad  scatter  wgrad
    row      forward           gemm  scatter      backward  gather  dgrad  wgrad

A column-parallel bias is added by its GEMM; it is split as the weight is. A row-parallel bias is
whole on every rank and joins after the scatter, where the residual stream is added (see
`residual`); each rank's gradient of it is the sum over its own tokens. With TP = 1 gathers and
scatters are left out, and their neighbours share a slot. An adapter adds to what the GEMM and its
dgrad have computed (see `adapted`). The GEMMs may be in 8 bits (see `eight_bits`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.protocols import LinearKernel
from lightning_dhellam.layers.adapted import AdaptedColumn, AdaptedRow
from lightning_dhellam.layers.adapter import adapter_of
from lightning_dhellam.layers.block import Setting, Supported, check_class, check_config
from lightning_dhellam.layers.eight_bits import EightBits
from lightning_dhellam.layers.rules import on_tp, products
from lightning_dhellam.layers.writer import GraphWriter, main_grad
from lightning_dhellam.parallel.gradients import taken_first
from lightning_dhellam.plan.layout import Held

SUPPORTED: Supported = {
    "fp4": (None,),
    "fp8": (None,),
    # Not `inference_optimized`, which gathers in another way where nothing is trained.
    "transformer_impl": ("transformer_engine", "local"),
}


@dataclass(frozen=True)
class _Linear:
    """What both kinds of linear layers have.

    Attributes:
        name: of the layer, which its operators' names begin with.
        weight: this rank's part [O, I]; it is read, and its `main_grad` is added to.
        bias: [O], or None.
        along: what the channels are that tensor-parallel ranks share.
        kernel: what computes the GEMMs.
        eight: what computes them in 8 bits instead, or None.
    """

    name: str
    weight: Parameter
    bias: Parameter | None
    along: Held
    kernel: LinearKernel
    eight: EightBits | None = None

    @classmethod
    def _parts(
        cls, module: Any, wanted: type, name: str, along: Held, setting: Setting, prefix: str
    ) -> tuple[str, Parameter, Parameter | None, Held, LinearKernel, EightBits | None]:
        check_class(module, wanted, f"linear_{name}", setting.index)
        check_config(module.config, SUPPORTED)
        name, weight = f"{prefix}{name}", module.weight
        eight = EightBits.of(name, weight, setting.eight, setting.index)
        return name, weight, module.bias, along, setting.kernels.linear, eight

    @property
    def _ends(self) -> tuple[Held, Held]:
        """How what it reads and what it computes of it lie, once all has been added up."""
        raise NotImplementedError

    @property
    def flops(self) -> float:
        """FLOPs per token of each of the three GEMMs."""
        return 2.0 * self.weight.numel()

    @property
    def measures(self) -> bool:
        """Whether its casts to 8 bits ask for the largest number of what it reads."""
        return self.eight is not None and self.eight.measures

    def _gemm(self, w: GraphWriter, read: str, write: str, bias: Parameter | None = None) -> None:
        if self.eight is not None:
            self.eight.forward(w, read, write, bias, self.flops, self._ends)
            return
        forward, weight = self.kernel.forward, self.weight
        w.compute(
            f"{self.name}.gemm",
            (read,),
            {write: w.sizes.wide(weight.shape[0])},
            lambda x: forward(x, weight, bias),
            flops=self.flops,
            # cuBLAS adds a bias in a GEMM of its other interface, which takes all processors.
            shrinks=self.kernel.SHRINKS and bias is None,
            rule=products(*self._ends),
        )

    def _dgrad(self, w: GraphWriter, grad: str, write: str) -> None:
        if self.eight is not None:
            self.eight.data_grad(w, grad, write, self.flops, self._ends)
            return
        dgrad, weight = self.kernel.dgrad, self.weight
        w.compute(
            f"{self.name}.dgrad",
            (grad,),
            {write: w.sizes.wide(weight.shape[1])},
            lambda dy: dgrad(dy, weight),
            flops=self.flops,
            shrinks=self.kernel.SHRINKS,
            rule=products(*reversed(self._ends)),
        )

    def _wgrad(self, w: GraphWriter, grad: str, read: str) -> None:
        """Add the weight's gradient, unless it is frozen."""
        accumulate, weight = self.kernel.accumulate_wgrad, self.weight
        reads, written = self._ends
        if not weight.requires_grad:
            return
        if self.eight is not None:
            self.eight.weight_grad(w, grad, read, self.flops, self._ends, self.along)
            return

        def run(dy: Tensor, x: Tensor) -> None:
            first = taken_first(weight)
            accumulate(main_grad(weight), dy, x, first=first)

        w.compute(
            f"{self.name}.wgrad",
            (grad, read),
            {},
            run,
            flops=self.flops,
            accumulates=(weight,),
            shrinks=self.kernel.SHRINKS,
            rule=on_tp((written, reads), gradient=self.along),
        )

    def _bias_grad(self, w: GraphWriter, grad: str, size: float) -> None:
        """Add the bias's gradient, unless it is frozen; `grad` has `size` bytes per token."""
        accumulate, bias = self.kernel.accumulate_bias_grad, self.bias
        if bias is None or not bias.requires_grad:
            return

        def run(dy: Tensor) -> None:
            first = taken_first(bias)
            accumulate(main_grad(bias), dy, first=first)

        name = f"{self.name}.bias.grad"
        w.compute(name, (grad,), {}, run, moved=size, accumulates=(bias,))


@dataclass(frozen=True)
class ColumnLinear(_Linear):
    """A linear layer of which each rank computes some output channels of every token.

    Attributes:
        adapter: what is trained beside the weight, or None.
    """

    adapter: AdaptedColumn | None = None

    @classmethod
    def of(
        cls, module: Any, name: str, along: Held, setting: Setting, prefix: str = ""
    ) -> ColumnLinear:
        """What lowers a Megatron-core `ColumnParallelLinear`; another class is refused."""
        parts = cls._parts(module, ColumnParallelLinear, name, along, setting, prefix)
        adapter = adapter_of(module)
        if adapter is None:
            return cls(*parts)
        kernels = setting.kernels
        return cls(
            *parts,
            AdaptedColumn(parts[0], adapter, along, kernels.linear, kernels.dropout, setting.index),
        )

    @property
    def _ends(self) -> tuple[Held, Held]:
        return Held.REPLICATED, self.along

    def forward(self, w: GraphWriter, read: str, write: str) -> None:
        """Add `write` [S, B, O] from `read` [s, B, I]."""
        whole = self.gather(w, read)
        if self.adapter is None:
            self.gemm(w, whole, write)
            return
        self.adapter.down(w, read)
        self.gemm(w, whole, f"{write}_base")
        self.adapter.up(w, f"{write}_base", write)

    def gather(self, w: GraphWriter, read: str) -> str:
        """Gather the input. Returns the slot of every token's."""
        name, whole = f"{self.name}.gather", self.whole(w, read)
        if self.eight is not None and self.eight.gather(w, name, read, whole):
            return whole
        return w.gather(name, read, whole, self.weight.shape[1])

    def gemm(self, w: GraphWriter, read: str, write: str) -> None:
        """Add `write` from the gathered input."""
        self._gemm(w, read, write, self.bias)

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add all gradients, from `grad` [S, B, O]. Returns the slot of that by `read`."""
        self._dgrad(w, grad, f"d_{read}_full")
        scattered = self.scatter_grad(w, read)
        self._wgrad(w, grad, self.whole(w, read))
        self._bias_grad(w, grad, w.sizes.wide(self.weight.shape[0]))
        if self.adapter is not None:
            return self.adapter.backward(w, grad, read, scattered)
        return scattered

    def scatter_grad(self, w: GraphWriter, read: str) -> str:
        """Scatter the gradient by the gathered input. Returns the slot of that by `read`."""
        channels = self.weight.shape[1]
        return w.scatter(f"{self.name}.grad_scatter", f"d_{read}_full", f"d_{read}", channels)

    def whole(self, w: GraphWriter, read: str) -> str:
        """The slot of every token's input."""
        return f"{read}_full" if w.sizes.tp > 1 else read


@dataclass(frozen=True)
class RowLinear(_Linear):
    """A linear layer of which each rank has some input channels: ranks add up what they compute.

    Attributes:
        adapter: what is trained beside the weight, or None.
    """

    adapter: AdaptedRow | None = None

    @classmethod
    def of(
        cls, module: Any, name: str, along: Held, setting: Setting, prefix: str = ""
    ) -> RowLinear:
        """What lowers a Megatron-core `RowParallelLinear`; another class is refused."""
        parts = cls._parts(module, RowParallelLinear, name, along, setting, prefix)
        adapter = adapter_of(module)
        if adapter is None:
            return cls(*parts)
        kernels = setting.kernels
        return cls(
            *parts,
            AdaptedRow(parts[0], adapter, along, kernels.linear, kernels.dropout, setting.index),
        )

    @property
    def _ends(self) -> tuple[Held, Held]:
        return self.along, Held.REPLICATED

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the output [s, B, O] without its bias from `read` [S, B, I]. Returns its slot."""
        partial = f"{self.name}_partial"
        base = partial if self.adapter is None else f"{partial}_base"
        self._gemm(w, read, base)
        if self.adapter is not None:
            self.adapter.forward(w, read, base, partial)
        channels = self.weight.shape[0]
        return w.scatter(f"{self.name}.scatter", partial, self.name, channels)

    def written(self, w: GraphWriter) -> str:
        """The slot of the output."""
        return self.name if w.sizes.tp > 1 else f"{self.name}_partial"

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add all gradients, from `grad` [s, B, O]. Returns the slot of that by `read`."""
        channels = self.weight.shape[0]
        whole = self._gather_grad(w, grad)
        base = f"d_{read}" if self.adapter is None else f"d_{read}_base"
        self._dgrad(w, whole, base)
        if self.adapter is not None:
            self.adapter.backward(w, whole, read, base, f"d_{read}")
        self._wgrad(w, whole, read)
        self._bias_grad(w, grad, w.sizes.wide(channels) / w.sizes.tp)
        return f"d_{read}"

    def _gather_grad(self, w: GraphWriter, grad: str) -> str:
        """Gather the gradient by the output. Returns the slot of every token's."""
        name, whole = f"{self.name}.grad_gather", f"d_{self.name}_full"
        # An adapter reads it in 16 bits.
        eight = self.eight if self.adapter is None else None
        if eight is not None and eight.gather_grad(w, name, grad, whole):
            return whole
        return w.gather(name, grad, whole, self.weight.shape[0])
