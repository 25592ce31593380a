"""How the part of a parameter that a rank has lies in the whole one, by Megatron's marks.

A parameter is cut along one axis, into one strip or several of which every rank has an equal share:
the input of a gated MLP has two, the rows of its gate and those of its up projection. Queries, keys
and values lie by groups of heads, so that they are one strip. An expert is a parameter of its own.
With a distributed optimizer a rank has the state of a flat range of its part, which is a few boxes
of the whole. All of it follows from sizes alone, so that any can be tried without ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import Module

from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.experts import ExpertNames, is_expert
from lightning_dhellam.parallel.replicas import counts_here, is_split
from lightning_dhellam.parallel.topology import Topology

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""Where a part begins in a tensor, and its shape."""


@dataclass(frozen=True)
class Share:
    """The part of a parameter that a rank has.

    Attributes:
        shape: of the whole parameter, padding of the vocabulary included.
        axis: along which it is cut; None if every rank has all of it.
        strips: of each of which a rank has an equal share.
        place: which share this rank has.
        places: how many shares there are.
        rows: how many the vocabulary has without padding; None for all other parameters.
        of_expert: whether it is an expert's, which ranks of their own share.
        counts: whether this rank writes it, or leaves it to others that have the same.
    """

    shape: Shape
    axis: int | None = None
    strips: int = 1
    place: int = 0
    places: int = 1
    rows: int | None = None
    of_expert: bool = False
    counts: bool = True

    @property
    def local(self) -> Shape:
        """The shape of this rank's part."""
        if self.axis is None:
            return self.shape
        cut = self.shape[self.axis] // self.places
        return (*self.shape[: self.axis], cut, *self.shape[self.axis + 1 :])

    def pieces(
        self, tensor: Tensor, part: Sequence[int] | None = None, saved_rows: int | None = None
    ) -> list[tuple[Shape, Tensor]]:
        """Views of `tensor`, each with the place in the whole parameter where it begins.

        Args:
            tensor: this rank's part, or with `part` that range of its elements, flat.
            part: the first element, and the one after the last.
            saved_rows: of the vocabulary that a checkpoint has; what comes after them is left out.
        """
        found: list[tuple[Shape, Tensor]] = []
        for start, view in _boxed(tensor, self.local, part):
            found += self._placed(start, view)
        if saved_rows is None:
            return found
        rows = ((start, view, saved_rows - start[0]) for start, view in found)
        return [(start, view[:left]) for start, view, left in rows if left > 0]

    def _placed(self, start: Shape, view: Tensor) -> Iterator[tuple[Shape, Tensor]]:
        axis = self.axis
        if axis is None or self.places == 1:
            yield start, view
            return
        strip = self.shape[axis] // self.strips
        own = strip // self.places
        for number in range(self.strips):
            first = max(start[axis], number * own)
            end = min(start[axis] + view.shape[axis], (number + 1) * own)
            if first < end:
                place = number * strip + self.place * own + first - number * own
                at = (*start[:axis], place, *start[axis + 1 :])
                yield at, view.narrow(axis, first - start[axis], end - first)

    def fits(self, saved: Shape) -> bool:
        """Whether a checkpoint's parameter of this shape is this one, but for padding."""
        if self.rows is None or len(saved) != len(self.shape):
            return saved == self.shape
        return saved[1:] == self.shape[1:] and saved[0] >= self.rows


def boxes(shape: Shape, start: int, end: int) -> Iterator[Box]:
    """A range of the elements of a tensor of `shape`, as boxes in the order of the elements."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:
        yield from _inside(shape, last, start - last * row, end - last * row)
        return
    if start % row:
        yield from _inside(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if end % row:
        yield from _inside(shape, last, 0, end - last * row)


def _inside(shape: Shape, index: int, start: int, end: int) -> Iterator[Box]:
    for at, size in boxes(shape[1:], start, end):
        yield (index, *at), (1, *size)


def _boxed(
    tensor: Tensor, shape: Shape, part: Sequence[int] | None
) -> Iterator[tuple[Shape, Tensor]]:
    if part is None:
        yield (0,) * len(shape), tensor
        return
    flat, at = tensor.reshape(-1), 0
    for start, size in boxes(shape, part[0], part[1]):
        count = prod(size)
        yield start, flat[at : at + count].view(size)
        at += count


Shares = Mapping[str, Share]
"""By the names of parameters, where experts have their numbers among all."""


def shares_of(module: Module, topology: Topology) -> dict[str, Share]:
    """How the parameters of a module lie, a user's own blocks included, which Megatron marks."""
    names, strips, rows = ExpertNames(module), _strips(module), _rows(module)
    return {
        names.of_all(name): _share(p, topology, strips.get(id(p), 1), rows.get(id(p)))
        for name, p in module.named_parameters(remove_duplicate=False)
    }


def _share(parameter: Any, topology: Topology, strips: int, rows: int | None) -> Share:
    of_expert = is_expert(parameter)
    place, places = (
        (topology.etp_rank, topology.etp_size)
        if of_expert
        else (topology.tp_rank, topology.tp_size)
    )
    whole = Share(
        tuple(parameter.shape),
        rows=rows,
        of_expert=of_expert,
        counts=counts_here(parameter, topology, in_parts=True),
    )
    if not is_split(parameter):
        return whole
    axis = parameter.partition_dim
    shape = [*parameter.shape]
    shape[axis] *= places
    strips = max(strips, getattr(parameter, "partition_stride", 1))
    return replace(whole, shape=tuple(shape), axis=axis, strips=strips, place=place, places=places)


def _strips(module: Module) -> dict[int, int]:
    """Parameters of two strips: not every version and kind of Megatron's layers marks them."""
    found: dict[int, int] = {}
    for layer in module.modules():
        fc1, config = getattr(layer, "linear_fc1", None), getattr(layer, "config", None)
        if isinstance(fc1, Module) and getattr(config, "gated_linear_unit", False):
            found |= {id(p): 2 for p in fc1.parameters()}
    return found


def _rows(module: Module) -> dict[int, int]:
    """Rows without padding, of what has a row for each word of the vocabulary."""
    found: dict[int, int] = {}
    for model in module.modules():
        if isinstance(model, CausalLM):
            words = model.embedding and model.embedding.word_embeddings
            tables = [table for table in (words, model.output_layer) if table is not None]
            rows = chain.from_iterable(table.parameters() for table in tables)
            found |= {id(p): model.config.vocab_size for p in rows}
    return found
