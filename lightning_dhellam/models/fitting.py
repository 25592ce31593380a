"""Whether tensors of Hugging Face are those of a model, by the table of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.conversion import Conversion
from lightning_dhellam.models.families import Family
from lightning_dhellam.models.layout import HEAD
from lightning_dhellam.models.stored import Readable, kind_of, listed
from lightning_dhellam.parallel.topology import Topology

KINDS = ("float64", "float32", "float16", "bfloat16")
"""Types of weights that are read and written."""

# Old checkpoints store this constant; the model computes it.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_ROWS = 4096
"""Of a vocabulary, that are compared at a time."""


def check_tensors(
    config: ModelConfig, every: Sequence[Conversion], tensors: Mapping[str, Readable]
) -> None:
    """Refuse tensors that are not those of a model, by their names, shapes and types.

    Raises:
        ValueError: with all that are missing, unexpected, of another shape or of another type.
    """
    expected = {name: shape for conversion in every for name, shape in conversion.theirs.items()}
    allowed = {*expected, HEAD} if config.tie_embeddings else set(expected)
    found = {name: tensors[name] for name in expected if name in tensors}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [
            name for name in tensors if name not in allowed and not name.endswith(_DERIVED_SUFFIX)
        ],
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
        f"of a type that is none of {', '.join(KINDS)}": [
            f"{name} {kind_of(tensor)}"
            for name, tensor in found.items()
            if kind_of(tensor) not in KINDS
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"the state dict does not fit the model: {said}. Choose the ModelConfig of the"
            " checkpoint"
        )


def check_tied(
    family: Family, config: ModelConfig, tensors: Mapping[str, Readable], topology: Topology
) -> None:
    """Refuse an output layer that is not the embedding, where the model has one for both.

    Every rank compares its share of the rows, some at a time.

    Raises:
        ValueError: on a rank whose share differs.
    """
    if not config.tie_embeddings or HEAD not in tensors:
        return
    head, embedding = tensors[HEAD], tensors[family.embedding]
    rows, step = config.vocab_size, _ROWS * topology.world_size
    same = tuple(head.shape) == tuple(embedding.shape)
    for start in range(topology.rank * _ROWS, rows if same else 0, step):
        part = slice(start, min(start + _ROWS, rows))
        same = same and torch.equal(head[part], embedding[part])
    if not same:
        raise ValueError(
            f"{HEAD} differs from {family.embedding}, but tie_embeddings=True makes them one: set"
            " tie_embeddings=False"
        )
