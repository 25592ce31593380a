"""The vocabulary-parallel embedding as operators.

forward   lookup|scatter  dropout
backward  dropout  gather|weight gradient
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.rules import DRAWN, DRAWS, on_tp
from lightning_dhellam.layers.writer import GraphWriter, Sizes, main_grad
from lightning_dhellam.plan import GraphPair, Strand
from lightning_dhellam.plan.layout import Held

SALT = (-1, 0)
"""Counters of the dropout after the embedding: no layer has these."""


def lower_embedding(words: Any, sizes: Sizes, kernels: Kernels, p: float) -> GraphPair:
    """Lower Megatron-core's VocabParallelEmbedding `words`, with dropout `p` after it.

    A frozen weight leaves nothing to do in backward.
    """
    weight, first = words.weight, words.vocab_start_index
    dropout, embedding = kernels.dropout, kernels.embedding
    forward = GraphWriter("embedding", Strand.FORWARD, sizes)
    forward.compute(
        "embedding.lookup",
        ("batch.tokens",),
        {"found" if sizes.tp > 1 or p else "y": sizes.whole},
        lambda tokens: embedding.forward(tokens, weight, first),
        moved=2 * sizes.whole,
        rule=on_tp(Held.REPLICATED, Held.PARTIAL),
    )
    if sizes.tp > 1:
        forward.scatter("embedding.scatter", "found", "embedded" if p else "y", sizes.hidden)
    if p:
        forward.compute(
            "embedding.dropout",
            ("embedded" if sizes.tp > 1 else "found", *DRAWS),
            {"y": sizes.shard},
            lambda x, key, places: (
                x if key is None else dropout.forward(x, p, dropout.derive_key(key, *SALT), places)
            ),
            moved=2 * sizes.shard,
            rule=DRAWN,
        )

    backward = GraphWriter("embedding", Strand.BACKWARD, sizes)
    if not weight.requires_grad:
        # The gradient still needs a reader: it is freed after its last one.
        backward.compute("embedding.frozen", ("dy",), {}, lambda dy: None)
        return GraphPair(forward.graph({}, ("y",)), backward.graph({"dy": sizes.shard}, ()))

    grad = "dy"
    if p:
        grad = "d_embedded"
        backward.compute(
            "embedding.dropout.grad",
            ("dy", *DRAWS),
            {grad: sizes.shard},
            lambda dy, key, places: dropout.backward(dy, p, dropout.derive_key(key, *SALT), places),
            moved=2 * sizes.shard,
            rule=DRAWN,
        )
    grad = backward.gather("embedding.grad_gather", grad, "d_found", sizes.hidden)

    def run(dy: Tensor, tokens: Tensor) -> None:
        embedding.accumulate_wgrad(main_grad(weight), dy, tokens, first)

    backward.compute(
        "embedding.wgrad",
        (grad, "batch.tokens"),
        {},
        run,
        moved=3 * sizes.whole,
        accumulates=(weight,),
        rule=on_tp(Held.REPLICATED, gradient=Held.VOCABULARY),
    )
    return GraphPair(forward.graph({}, ("y",)), backward.graph({"dy": sizes.shard}, ()))
