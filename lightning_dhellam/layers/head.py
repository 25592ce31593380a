"""Final norm, output layer and vocabulary-parallel cross-entropy as operators.

    forward   norm  gather|output  statistics|gather  combine
    backward  loss gradient  data gradient|scatter  weight gradient  norm gradient

The ranks exchange three numbers per token, once. Logits stay in the type of activations between
forward and backward; where that type is fp32 they are computed again in backward, a chunk of
tokens at a time, so that fp32 logits of a whole micro-batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.linear import ColumnLinear
from lightning_dhellam.layers.norm import Norm
from lightning_dhellam.layers.rules import OF_TOKENS, gathers, on_tp
from lightning_dhellam.layers.writer import GraphWriter, Sizes, main_grad
from lightning_dhellam.parallel import collectives
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.plan import Collective, Graph, GraphPair, Lane, Strand
from lightning_dhellam.plan.layout import CHANNELS, Held, Move, Rule

Loss = Callable[[Tensor, Any], Tensor]
"""A user's loss: logits [B, S, V] and the micro-batch to a scalar, under autograd."""


@dataclass(frozen=True)
class HeadLowering:
    """Everything that the operators of the head are made from.

    Attributes:
        norm: the final norm.
        output: the output layer, whose weight [V_rank, H] is the embedding's when tied; it may have
            a bias [V_rank].
        vocab_size: without padding.
        sizes: of slots and costs.
        kernels: what computes the operators.
        loss: a user's loss, or None for cross-entropy.
    """

    norm: Norm
    output: ColumnLinear
    vocab_size: int
    sizes: Sizes
    kernels: Kernels
    loss: Loss | None = None

    @property
    def columns(self) -> int:
        """Columns of this rank, with those that pad the vocabulary."""
        return self.output.weight.shape[0]

    @property
    def first(self) -> int:
        """Vocabulary index of this rank's first column."""
        return self.sizes.context.topology.tp_rank * self.columns

    @property
    def valid(self) -> int:
        """Columns of this rank that are vocabulary and not padding."""
        return max(0, min(self.columns, self.vocab_size - self.first))

    def lower(self) -> GraphPair:
        """Both directions, with the loss as output of forward and no input of backward."""
        if self.loss is not None:
            return GraphPair(self._custom_forward(), self._custom_backward())
        if self.sizes.dtype is torch.float32:
            return GraphPair(self._chunked_forward(), self._chunked_backward())
        return GraphPair(self._forward(), self._backward())

    def lower_logits(self) -> Graph:
        """Forward only: logits [B, S, V] of the whole vocabulary, for prediction."""
        w = self._begin("logits")
        self._all_logits(w, self._normalised(w))
        return w.graph({"x": self.sizes.shard}, ("logits_whole",))

    def _begin(self, name: str = "head") -> GraphWriter:
        return GraphWriter(name, Strand.FORWARD, self.sizes)

    def _normalised(self, w: GraphWriter) -> str:
        """Add the norm. Returns the slot of every token's."""
        return self.output.gather(w, self.norm.forward(w, "x"))

    def _forward(self) -> Graph:
        w = self._begin()
        self.output.gemm(w, self._normalised(w), "logits")
        w.compute(
            "loss.statistics",
            ("logits", "batch.labels"),
            {"statistics": 12.0},
            lambda logits, labels: self.kernels.cross_entropy.statistics(
                logits.flatten(0, 1), labels.flatten(), self.first, self.valid
            ),
            moved=self.sizes.wide(self.columns),
            rule=on_tp((Held.VOCABULARY, Held.REPLICATED), Held.VOCABULARY),
        )
        return self._combine(w)

    def _chunked_forward(self) -> Graph:
        w = self._begin()
        linear, weight, bias = self.kernels.linear, self.output.weight, self.output.bias

        def run(x: Tensor, labels: Tensor) -> Tensor:
            chunks = zip(*map(self._chunks, (x.flatten(0, 1), labels.flatten())), strict=True)
            parts = [
                self.kernels.cross_entropy.statistics(
                    linear.forward(rows, weight, bias), chunk, self.first, self.valid
                )
                for rows, chunk in chunks
            ]
            return torch.cat(parts, dim=1)

        w.compute(
            "output.statistics",
            (self._normalised(w), "batch.labels"),
            {"statistics": 12.0},
            run,
            flops=self.output.flops,
            rule=on_tp(Held.REPLICATED, Held.VOCABULARY),
        )
        return self._combine(w)

    def _combine(self, w: GraphWriter) -> Graph:
        """Add what makes the loss: the ranks exchange three numbers per token."""
        read, ranks = "statistics", self.sizes.tp
        if ranks > 1:
            size = 12.0 * ranks
            w.collective(
                Lane.TP,
                "loss.gather",
                (read,),
                {"statistics_all": size},
                collectives.all_gather,
                Collective.ALL_GATHER,
                gathers(Lane.TP, Held.VOCABULARY),
                crossing=size - 12.0,
            )
            read = "statistics_all"

        def run(statistics: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            loss, lse = self.kernels.cross_entropy.combine(statistics.view(ranks, 3, -1))
            return (loss * weights.flatten()).sum(), lse

        w.compute(
            "loss.combine",
            (read, "batch.weights"),
            {"loss": 0.0, "lse": 4.0},
            run,
            moved=100.0,
            rule=Rule(sums=("loss",)),
        )
        return w.graph({"x": self.sizes.shard}, ("loss",))

    def _backward(self) -> Graph:
        w = GraphWriter("head", Strand.BACKWARD, self.sizes)
        width = self.sizes.wide(self.columns)

        def run(logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor) -> Tensor:
            flat = (logits.flatten(0, 1), labels.flatten(), lse, weights.flatten())
            grad = self.kernels.cross_entropy.backward_(*flat, self.first, self.valid)
            return grad.view(logits.shape)

        w.compute(
            "loss.grad",
            ("logits", "batch.labels", "lse", "batch.weights"),
            {"d_logits": width},
            run,
            moved=2 * width,
            takes=(("d_logits", "logits"),),
            rule=on_tp((Held.VOCABULARY, *[Held.REPLICATED] * 3), Held.VOCABULARY),
        )
        return self._output_backward(w)

    def _output_backward(self, w: GraphWriter) -> Graph:
        """Add what makes `dx` of `d_logits`."""
        return self._norm_grad(w, self.output.backward(w, "d_logits", self.norm.output))

    def _chunked_backward(self) -> Graph:
        w = GraphWriter("head", Strand.BACKWARD, self.sizes)
        linear, weight, bias = self.kernels.linear, self.output.weight, self.output.bias

        def run(x: Tensor, labels: Tensor, lse: Tensor, weights: Tensor) -> Tensor:
            out = torch.empty_like(x)
            labels, weights = labels.flatten(), weights.flatten()
            flat = (x.flatten(0, 1), labels, lse, weights, out.flatten(0, 1))
            for rows, label, total, counts, part in zip(*map(self._chunks, flat), strict=True):
                logits = linear.forward(rows, weight, bias)
                flat_chunk = (logits, label, total, counts, self.first, self.valid)
                grad = self.kernels.cross_entropy.backward_(*flat_chunk)
                part.copy_(linear.dgrad(grad, weight))
                if weight.requires_grad:
                    linear.accumulate_wgrad(main_grad(weight), grad, rows)
                if bias is not None and bias.requires_grad:
                    linear.accumulate_bias_grad(main_grad(bias), grad)
            return out

        w.compute(
            "output.grad",
            (self.output.whole(w, self.norm.output), "batch.labels", "lse", "batch.weights"),
            {"d_final_norm_full": self.sizes.whole},
            run,
            flops=(3 if weight.requires_grad else 2) * self.output.flops,
            accumulates=(weight,) if bias is None else (weight, bias),
            rule=on_tp(Held.REPLICATED, Held.PARTIAL, Held.VOCABULARY),
        )
        return self._norm_grad(w, self.output.scatter_grad(w, self.norm.output))

    def _norm_grad(self, w: GraphWriter, grad: str) -> Graph:
        self.norm.backward(w, grad, "x", "dx")
        return w.graph({}, ("dx",))

    def _chunks(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Split the tokens of `flat` [N, ...]."""
        return flat.split(self.kernels.cross_entropy.CHUNK)

    def _all_logits(self, w: GraphWriter, read: str) -> None:
        """Add the slot `logits_whole` [B, S, V]: every column, in the batch's own layout."""
        self.output.gemm(w, read, "logits")
        read = "logits"
        if self.sizes.tp > 1:
            mine = self.sizes.wide(self.columns)
            size = mine * self.sizes.tp
            w.collective(
                Lane.TP,
                "logits.gather",
                (read,),
                {"logits_of_ranks": size},
                _gather_ranks,
                Collective.ALL_GATHER,
                gathers(Lane.TP, Held.VOCABULARY),
                crossing=size - mine,
            )
            read = "logits_of_ranks"

        def run(logits: Tensor) -> Tensor:
            ranks = logits.view(-1, *logits.shape[-3:])
            whole = ranks.permute(2, 1, 0, 3).flatten(2)
            return whole[..., : self.vocab_size].contiguous()

        whole = self.sizes.wide(self.vocab_size)
        w.compute(
            "logits.arrange",
            (read,),
            {"logits_whole": whole},
            run,
            moved=2 * whole,
            rule=OF_TOKENS,
        )

    def _custom_forward(self) -> Graph:
        w = self._begin()
        self._all_logits(w, self._normalised(w))
        loss = self.loss
        assert loss is not None

        def run(logits: Tensor, batch: Any, share: float) -> tuple[Tensor, Any]:
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_()
                value = loss(leaf, batch) * share
            return value.detach().float(), (leaf, value)

        w.compute(
            "loss.custom",
            ("logits_whole", "batch.data", "batch.share"),
            {"loss": 0.0, "loss_graph": self.sizes.wide(self.vocab_size)},
            run,
            moved=4 * self.sizes.wide(self.vocab_size),
            records=("loss_graph",),
            # Where ranks share sequences, each takes the loss of its own part.
            rule=Rule(
                {"cp": Move(Held.SEQUENCE, (Held.PARTIAL, Held.SEQUENCE))},
                mixes=CHANNELS | {Held.SEQUENCE},
                sums=("loss",),
            ),
        )
        return w.graph({"x": self.sizes.shard}, ("loss",))

    def _custom_backward(self) -> Graph:
        w = GraphWriter("head", Strand.BACKWARD, self.sizes)
        columns, first, valid = self.columns, self.first, self.valid

        def run(graph: Any) -> Tensor:
            leaf, value = graph
            # The slot of the graph goes after its last reader; a profile reads it again.
            (grad,) = torch.autograd.grad(value, [leaf], retain_graph=True)
            mine = grad.new_zeros(*grad.shape[:2], columns)
            mine[..., :valid] = grad[..., first : first + valid]
            return mine.transpose(0, 1).contiguous()

        w.compute(
            "loss.custom.grad",
            ("loss_graph",),
            {"d_logits": self.sizes.wide(columns)},
            run,
            moved=4 * self.sizes.wide(self.vocab_size),
            rule=on_tp(Held.REPLICATED, Held.VOCABULARY),
        )
        return self._output_backward(w)


def _gather_ranks(communicator: Communicator, logits: Tensor) -> collectives.Pending:
    """Logits [S, B, V_rank] of every rank: [R, S, B, V_rank]."""
    return collectives.all_gather(communicator, logits[None])
