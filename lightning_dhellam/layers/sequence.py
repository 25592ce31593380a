"""What a user's own block sees of a sequence that tensor-parallel ranks share.

Between the layers each rank holds some tokens of every sequence. A block of which nothing is known
may mix tokens (a convolution, a recurrence, positions), so it is given the whole sequence, on each
rank the same. One that works token by token says so and is given the rank's own tokens:

    class Gate(torch.nn.Module):
        token_wise = True

Megatron's parallel linear layers join either: of the whole each rank computes its channels, and of
its own tokens they gather and scatter by themselves, if they were built with `sequence_parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch.nn import Module


def is_token_wise(block: Module) -> bool:
    """Whether `block` works token by token, or exchanges tokens itself, and says so."""
    return bool(getattr(block, "token_wise", False))


def check_parallel_layers(block: Module, index: int) -> None:
    """Refuse a block of a rank's own tokens with layers that take them for the whole sequence.

    Raises:
        ValueError: naming the layer of the model, and the linear layer inside it.
    """
    for name, module in block.named_modules():
        linear = isinstance(module, (ColumnParallelLinear, RowParallelLinear))
        if linear and not module.sequence_parallel:
            raise ValueError(
                f"layer {index}, a {type(block).__name__}, has token_wise = True, so it is given"
                f" each rank's own tokens, but its '{name}', a {type(module).__name__}, takes the"
                " whole sequence: build it with sequence_parallel=True, or leave token_wise out"
            )


@contextmanager
def of_whole_sequences(block: Module) -> Iterator[None]:
    """Inside, Megatron's layers in `block` neither gather nor scatter the sequence."""
    kept = [
        (module, name, getattr(module, name))
        for module in block.modules()
        for name in _of_whole(module)
    ]
    try:
        for module, _, _ in kept:
            for name, value in _of_whole(module).items():
                setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _of_whole(module: Module) -> dict[str, Any]:
    """What Megatron sets in a layer that is built without sequence parallelism."""
    if isinstance(module, ColumnParallelLinear):
        several = module.tp_group.size() > 1
        return {
            "sequence_parallel": False,
            "allreduce_dgrad": several and not module.disable_grad_reduce,
        }
    if isinstance(module, RowParallelLinear):
        return {"sequence_parallel": False}
    if isinstance(module, VocabParallelEmbedding):
        return {"reduce_scatter_embeddings": False}
    return {}
