"""The MLPs of a rank's experts as operators, each over the rows that have come for it.

    forward   fc1  act  fc2
    backward  fc2.dgrad  fc2.wgrad  act.grad  fc1.dgrad  fc1.wgrad

The GEMMs of all experts are one operator (`kernels.grouped`). The routing weight of a row
multiplies what the activation gives and the bias of the second layer, as in Megatron-core. An
expert without rows gets gradients of zero. Shapes: R rows, ordered by expert, L experts, I and O
channels of a linear layer, F channels inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.protocols import ActivationKernel, GroupedKernel
from lightning_dhellam.layers.block import Setting, check_class
from lightning_dhellam.layers.dispatch import Dispatch, Ordered
from lightning_dhellam.layers.mlp import activation_of
from lightning_dhellam.layers.rows import Rows
from lightning_dhellam.layers.rules import ALIKE, on_tp
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.parallel.gradients import taken_first
from lightning_dhellam.plan.layout import Held, Rule

_KINDS = {"fc1": ColumnParallelLinear, "fc2": RowParallelLinear}


@dataclass(frozen=True)
class ExpertMlp:
    """The experts of a rank: Megatron-core `MLP`s of one shape.

    Attributes:
        fc1: weights of the first linear layer of each expert [O, H], O being F, or 2F with a gate.
        fc2: those of the second [H, F].
        fc1_bias: biases [O] of the first, or none at all.
        fc2_bias: biases [H] of the second, or none at all.
        activation: between them.
        grouped: what computes the GEMMs.
        dispatch: what brings the rows.
    """

    fc1: tuple[Parameter, ...]
    fc2: tuple[Parameter, ...]
    fc1_bias: tuple[Parameter, ...]
    fc2_bias: tuple[Parameter, ...]
    activation: ActivationKernel
    grouped: GroupedKernel
    dispatch: Dispatch

    @classmethod
    def of(cls, experts: Sequence[Any], setting: Setting, dispatch: Dispatch) -> ExpertMlp:
        """What lowers the `experts` of this rank; another class inside them is refused.

        Raises:
            ValueError: an expert is not made of the linear layers that are lowered, or it has a
                bias that several ranks would add.
        """
        for expert in experts:
            for name, wanted in _KINDS.items():
                role = f"expert's linear_{name}"
                check_class(getattr(expert, f"linear_{name}"), wanted, role, setting.index)
        fc1, fc2 = ([getattr(e, f"linear_{name}") for e in experts] for name in _KINDS)
        if dispatch.shared and any(linear.bias is not None for linear in fc2):
            raise ValueError(
                f"layer {setting.index}: its experts have biases (add_bias_linear=True) and are"
                " split over tensor-parallel ranks, each of which would add them: use"
                " expert_tensor_parallel_size=1"
            )
        return cls(
            tuple(linear.weight for linear in fc1),
            tuple(linear.weight for linear in fc2),
            tuple(linear.bias for linear in fc1 if linear.bias is not None),
            tuple(linear.bias for linear in fc2 if linear.bias is not None),
            activation_of(experts[0].config, setting.kernels),
            setting.kernels.grouped,
            dispatch,
        )

    def forward(self, w: GraphWriter, rows: Ordered) -> str:
        """Add the operators of forward. Returns the slot of what the experts find [R, H]."""
        grouped, bias, bias_of_result = self.grouped, self.fc1_bias, self.fc2_bias
        weights, last = self.fc1, self.fc2
        sized = _sized(rows)

        def first(x: Tensor, ends: Tensor, rows: Rows | None = None) -> Tensor:
            sizes = _of_experts(rows)
            found = grouped.forward(x, weights, ends, sizes)
            return grouped.add_bias_(found, bias, ends, sizes) if bias else found

        def second(x: Tensor, scale: Tensor, ends: Tensor, rows: Rows | None = None) -> Tensor:
            sizes = _of_experts(rows)
            found = grouped.forward(x, last, ends, sizes)
            if bias_of_result:
                grouped.add_bias_(found, bias_of_result, ends, sizes, scale)
            return found

        w.compute(
            "experts.fc1",
            (rows.hidden, *sized),
            {"experts_inner": self._size(w, self.fc1[0].shape[0])},
            first,
            flops=self._flops(w, self.fc1),
            shrinks=grouped.SHRINKS,
            varies=True,
            rule=self._on_tp((Held.REPLICATED,), sized, Held.FFN),
        )
        w.compute(
            "experts.act",
            ("experts_inner", rows.weights),
            {"experts_act": self._size(w, self.fc2[0].shape[1])},
            self.activation.weighted_forward,
            moved=self._size(w, self.fc1[0].shape[0] + self.fc2[0].shape[1]),
            varies=self.dispatch.ranks > 1,
            rule=self._on_tp((Held.FFN, Held.REPLICATED), (), Held.FFN),
        )
        w.compute(
            "experts.fc2",
            ("experts_act", rows.weights, *sized),
            {"experts_found": self._size(w, self.fc2[0].shape[0])},
            second,
            flops=self._flops(w, self.fc2),
            shrinks=grouped.SHRINKS,
            varies=True,
            rule=self._on_tp((Held.FFN, Held.REPLICATED), sized, Held.PARTIAL),
        )
        return "experts_found"

    def backward(self, w: GraphWriter, grad: str, rows: Ordered) -> tuple[str, str]:
        """Add the operators of backward, from `grad` of what the experts find.

        Returns the slots of the gradients by their rows [R, H], and by the rows' weights [R].
        """
        weights = "d_weights_of_act" if self.fc2_bias else "d_row_weights"
        self._data_grad(w, "experts.fc2", self.fc2, grad, "d_experts_act", rows)
        self._weight_grad(w, "experts.fc2", self.fc2, grad, "experts_act", rows)
        w.compute(
            "experts.act.grad",
            ("d_experts_act", "experts_inner", rows.weights),
            {
                "d_experts_inner": self._size(w, self.fc1[0].shape[0]),
                weights: 4 * self.dispatch.rows(w),
            },
            self.activation.weighted_backward,
            moved=self._size(w, 2 * self.fc1[0].shape[0] + self.fc2[0].shape[1]),
            varies=self.dispatch.ranks > 1,
            rule=self._on_tp((Held.FFN, Held.FFN, Held.REPLICATED), (), (Held.FFN, Held.PARTIAL)),
        )
        if self.fc2_bias:
            self._result_bias_grad(w, grad, weights, rows)
        self._data_grad(w, "experts.fc1", self.fc1, "d_experts_inner", "d_rows", rows)
        self._weight_grad(w, "experts.fc1", self.fc1, "d_experts_inner", rows.hidden, rows)
        if self._is_trained(self.fc1_bias):
            bias, bias_grad = self.fc1_bias, self.grouped.bias_grad

            def run(dy: Tensor, ends: Tensor, rows: Rows | None = None) -> None:
                if any(one.requires_grad for one in bias):
                    bias_grad(dy, *_gradients(bias), ends, _of_experts(rows))

            w.compute(
                "experts.fc1.bias.grad",
                ("d_experts_inner", *_sized(rows)),
                {},
                run,
                moved=self._size(w, self.fc1[0].shape[0]),
                accumulates=bias,
                varies=True,
            )
        return "d_rows", "d_row_weights"

    def _data_grad(
        self,
        w: GraphWriter,
        name: str,
        weights: tuple[Parameter, ...],
        grad: str,
        write: str,
        rows: Ordered,
    ) -> None:
        data_grad, sized = self.grouped.data_grad, _sized(rows)
        reads, writes = self._ends(name)
        summed = Held.PARTIAL if writes is Held.FFN else reads
        w.compute(
            f"{name}.dgrad",
            (grad, *sized),
            {write: self._size(w, weights[0].shape[1])},
            lambda dy, ends, rows=None: data_grad(dy, weights, ends, _of_experts(rows)),
            flops=self._flops(w, weights),
            shrinks=self.grouped.SHRINKS,
            varies=True,
            rule=self._on_tp((writes,), sized, summed),
        )

    def _weight_grad(
        self,
        w: GraphWriter,
        name: str,
        weights: tuple[Parameter, ...],
        grad: str,
        read: str,
        rows: Ordered,
    ) -> None:
        """Add the weights' gradients, unless all are frozen."""
        if not self._is_trained(weights):
            return
        weight_grad, sized = self.grouped.weight_grad, _sized(rows)
        reads, writes = self._ends(name)

        def run(dy: Tensor, x: Tensor, ends: Tensor, rows: Rows | None = None) -> None:
            if any(weight.requires_grad for weight in weights):
                weight_grad(dy, x, *_gradients(weights), ends, _of_experts(rows))

        w.compute(
            f"{name}.wgrad",
            (grad, read, *sized),
            {},
            run,
            flops=self._flops(w, weights),
            accumulates=weights,
            shrinks=self.grouped.SHRINKS,
            varies=True,
            rule=self._on_tp((writes, reads), sized, gradient=Held.FFN),
        )

    def _result_bias_grad(self, w: GraphWriter, grad: str, weights: str, rows: Ordered) -> None:
        """Add gradients of what the second bias takes part in: the bias, and the routing weight."""
        bias, grouped = self.fc2_bias, self.grouped

        def run(
            dy: Tensor, part: Tensor, scale: Tensor, ends: Tensor, rows: Rows | None = None
        ) -> Tensor:
            sizes = _of_experts(rows)
            if any(one.requires_grad for one in bias):
                grouped.bias_grad(dy, *_gradients(bias), ends, sizes, scale)
            added = grouped.add_bias_(torch.zeros_like(dy), bias, ends, sizes)
            return part + (dy.float() * added).sum(1)

        w.compute(
            "experts.fc2.bias.grad",
            (grad, weights, rows.weights, *_sized(rows)),
            {"d_row_weights": 4 * self.dispatch.rows(w)},
            run,
            moved=self._size(w, 2 * self.fc2[0].shape[0]),
            accumulates=bias,
            varies=True,
        )

    def _is_trained(self, parameters: tuple[Parameter, ...]) -> bool:
        """Whether there is an operator that adds to their gradients, on this rank or another.

        Ranks that share experts have the same operators: all may be frozen on one of them only.
        """
        shares = bool(parameters) and self.dispatch.ranks > 1
        return shares or any(parameter.requires_grad for parameter in parameters)

    def _ends(self, name: str) -> tuple[Held, Held]:
        """How what a linear layer reads and what it computes of it lie, once all is added up."""
        first = name == "experts.fc1"
        return (Held.REPLICATED, Held.FFN) if first else (Held.FFN, Held.REPLICATED)

    def _on_tp(
        self,
        reads: tuple[Held, ...],
        sized: tuple[str, ...],
        writes: Held | tuple[Held, ...] = Held.REPLICATED,
        gradient: Held | None = None,
    ) -> Rule:
        """The rule where tensor-parallel ranks share experts, of `reads` and of what says sizes."""
        if not self.dispatch.shared:
            return ALIKE
        return on_tp((*reads, *[Held.REPLICATED] * len(sized)), writes, gradient)

    def _size(self, w: GraphWriter, channels: int) -> float:
        """Bytes of so many channels of all rows, for each token of the micro-batch."""
        return w.sizes.wide(channels) * self.dispatch.rows(w)

    def _flops(self, w: GraphWriter, weights: tuple[Parameter, ...]) -> float:
        """FLOPs of each of the three GEMMs, for each token of the micro-batch."""
        return 2.0 * weights[0].numel() * self.dispatch.rows(w)


def _sized(rows: Ordered) -> tuple[str, ...]:
    """The slots that say how many rows each expert has."""
    return (rows.ends,) if rows.rows is None else (rows.ends, rows.rows)


def _of_experts(rows: Rows | None) -> tuple[int, ...] | None:
    return None if rows is None else rows.of_experts


def _gradients(parameters: Sequence[Parameter]) -> tuple[list[Tensor], list[bool]]:
    """What gradients are added to, and which of it is old; that of a frozen one is thrown away."""
    grads: list[Tensor | None] = [
        p.main_grad if p.requires_grad else None  # type: ignore[attr-defined]
        for p in parameters
    ]
    spare = next(grad for grad in grads if grad is not None)
    kept = [torch.empty_like(spare) if grad is None else grad for grad in grads]
    return kept, [not p.requires_grad or taken_first(p) for p in parameters]
