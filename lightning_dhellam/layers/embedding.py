"""The vocabulary-parallel embedding as operators, with the table of positions if there is one.

forward   lookup|scatter  positions  dropout
backward  dropout  positions' weight gradient  gather|weight gradient

Rows of positions are added where each rank has its own tokens, so that none adds another's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.rules import DRAWN, DRAWS, on_tp
from lightning_dhellam.layers.writer import GraphWriter, Sizes, main_grad
from lightning_dhellam.plan import Graph, GraphPair, Strand
from lightning_dhellam.plan.layout import Held

SALT = (-1, 0)
"""Counters of the dropout after the embedding: no layer has these."""

_PLACED = (Held.SEQUENCE, Held.REPLICATED)
"""How hidden states and the positions of all tokens lie on tensor-parallel ranks."""


def lower_embedding(embedding: Any, sizes: Sizes, kernels: Kernels) -> GraphPair:
    """Lower Megatron-core's `LanguageModelEmbedding`.

    A frozen weight leaves nothing to do in backward.
    """
    positions = embedding.position_embeddings.weight if embedding.add_position_embedding else None
    words = embedding.word_embeddings
    lowering = _Embedding(
        words.weight,
        words.vocab_start_index,
        positions,
        float(embedding.embedding_dropout.p),
        sizes,
        kernels,
    )
    return GraphPair(lowering.forward(), lowering.backward())


@dataclass(frozen=True)
class _Embedding:
    """What is looked up.

    Attributes:
        words: this rank's part [V / TP, H] of the vocabulary's table.
        first: the id of its first row.
        positions: the table [L, H] of positions, or None.
        p: probability of dropping an element.
        sizes: that sizes of slots follow from.
        kernels: what computes the operators.
    """

    words: Parameter
    first: int
    positions: Parameter | None
    p: float
    sizes: Sizes
    kernels: Kernels

    def forward(self) -> Graph:
        w, sizes = GraphWriter("embedding", Strand.FORWARD, self.sizes), self.sizes
        words, first, embedding = self.words, self.first, self.kernels.embedding
        # The last of the operators that there are writes what is handed over.
        steps = [sizes.tp > 1, self.positions is not None, self.p > 0]
        slots = [
            slot if any(steps[number:]) else "y"
            for number, slot in enumerate(("found", "embedded", "placed"))
        ]
        w.compute(
            "embedding.lookup",
            ("batch.tokens",),
            {slots[0]: sizes.whole},
            lambda tokens: embedding.forward(tokens, words, first),
            moved=2 * sizes.whole,
            rule=on_tp(Held.REPLICATED, Held.PARTIAL),
        )
        read = w.scatter("embedding.scatter", slots[0], slots[1], sizes.hidden)
        if self.positions is not None:
            read = self._add_positions(w, read, slots[2], self.positions)
        if self.p:
            self._drop(w, read)
        return w.graph({}, ("y",))

    def backward(self) -> Graph:
        w, sizes = GraphWriter("embedding", Strand.BACKWARD, self.sizes), self.sizes
        tables = [table for table in (self.words, self.positions) if table is not None]
        if not any(table.requires_grad for table in tables):
            # The gradient still needs a reader: it is freed after its last one.
            w.compute("embedding.frozen", ("dy",), {}, lambda dy: None)
            return w.graph({"dy": sizes.shard}, ())
        grad = self._drop_grad(w) if self.p else "dy"
        if self.positions is not None and self.positions.requires_grad:
            self._positions_grad(w, grad, self.positions)
        if self.words.requires_grad:
            self._words_grad(w, w.gather("embedding.grad_gather", grad, "d_found", sizes.hidden))
        return w.graph({"dy": sizes.shard}, ())

    def _words_grad(self, w: GraphWriter, grad: str) -> None:
        words, first, embedding = self.words, self.first, self.kernels.embedding

        def run(dy: Tensor, tokens: Tensor) -> None:
            embedding.accumulate_wgrad(main_grad(words), dy, tokens, first)

        w.compute(
            "embedding.wgrad",
            (grad, "batch.tokens"),
            {},
            run,
            moved=3 * self.sizes.whole,
            accumulates=(words,),
            rule=on_tp(Held.REPLICATED, gradient=Held.VOCABULARY),
        )

    def _own(self, positions: Tensor) -> Tensor:
        """[B, S / TP], of the tokens that this rank has between the layers, from [S, B]."""
        topology = self.sizes.context.topology
        return positions.chunk(topology.tp_size)[topology.tp_rank].t()

    def _add_positions(self, w: GraphWriter, read: str, write: str, table: Parameter) -> str:
        embedding = self.kernels.embedding
        w.compute(
            "embedding.positions",
            (read, "batch.positions"),
            {write: self.sizes.shard},
            lambda x, positions: x + embedding.forward(self._own(positions), table, 0),
            moved=3 * self.sizes.shard,
            rule=on_tp(_PLACED, Held.SEQUENCE),
        )
        return write

    def _positions_grad(self, w: GraphWriter, grad: str, table: Parameter) -> None:
        embedding = self.kernels.embedding

        def run(dy: Tensor, positions: Tensor) -> None:
            embedding.accumulate_wgrad(main_grad(table), dy, self._own(positions), 0)

        w.compute(
            "embedding.positions.wgrad",
            (grad, "batch.positions"),
            {},
            run,
            moved=3 * self.sizes.shard,
            accumulates=(table,),
            rule=on_tp(_PLACED, gradient=Held.PARTIAL),
        )

    def _drop(self, w: GraphWriter, read: str) -> None:
        p, dropout = self.p, self.kernels.dropout
        w.compute(
            "embedding.dropout",
            (read, *DRAWS),
            {"y": self.sizes.shard},
            lambda x, key, places: (
                x if key is None else dropout.forward(x, p, dropout.derive_key(key, *SALT), places)
            ),
            moved=2 * self.sizes.shard,
            rule=DRAWN,
        )

    def _drop_grad(self, w: GraphWriter) -> str:
        p, dropout = self.p, self.kernels.dropout
        w.compute(
            "embedding.dropout.grad",
            ("dy", *DRAWS),
            {"d_embedded": self.sizes.shard},
            lambda dy, key, places: dropout.backward(dy, p, dropout.derive_key(key, *SALT), places),
            moved=2 * self.sizes.shard,
            rule=DRAWN,
        )
        return "d_embedded"
