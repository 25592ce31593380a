"""Attention with a window over sequences that context-parallel ranks share.

The window of a rank's queries reaches into pieces of a few other ranks, and into parts of these. So
keys come at once, whichever way those of other layers take, and each of this rank's two pieces of
the sequence (`parallel.zigzag`) attends to the tokens that its window holds, from its own last one
back:

    compute   keys |        | attention
    cp             | gather |

Backward does the same with gradients: those by keys are summed over the ranks.

Shapes: C ranks, S tokens of this rank, B batch, H query heads, G key and value heads, D head size,
W tokens of the window. Keys and values travel together: [2, S, B, G, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.heads import Heads, Parts
from lightning_dhellam.kernels.packed_attention import Runs
from lightning_dhellam.layers.among import Among, Told
from lightning_dhellam.layers.rules import of_documents
from lightning_dhellam.layers.ways import Gathered
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.parallel import zigzag
from lightning_dhellam.plan.layout import Held, Move


@dataclass(frozen=True)
class SharedWindow:
    """Causal attention within a window, among the tokens of all ranks that share a sequence.

    Attributes:
        heads: of this rank.
        among: attends to a block of keys, within a window of W tokens.
        read: the slot of the heads.
        cut: takes queries, keys and values out of it.
        way: by which keys come, and their gradients go home.
        backward_flops: of backward in those of forward.
    """

    heads: Heads
    among: Among
    read: str
    cut: Callable[[Tensor], Parts]
    way: Gathered
    backward_flops: float

    def forward(self, w: GraphWriter) -> None:
        """Add what makes `context` [S, B, H*D] and `lse` [B, H, S]."""
        self._bring(w, "attention.keys", "keys")
        among, queries = self.among, self.heads.queries

        def run(*read: Any) -> tuple[Tensor, Tensor, Any]:
            told, (heads, brought) = among.apart(read)
            q, _, _ = self.cut(heads)
            parts = [
                among.forward(
                    q[rows], *self._keys(brought, piece, first), self._inside(told, piece, first, q)
                )
                for piece, rows, first in self._pieces(len(q))
            ]
            outs, lses, states = zip(*parts, strict=True)
            return torch.cat(outs), torch.cat(lses, dim=2), states

        w.compute(
            "attention",
            (*among.told, self.read, self.way.slot(1, "keys")),
            {
                "context": w.sizes.wide(queries * self.heads.size),
                "lse": 4 * queries,
                "attention_state": 0,
            },
            run,
            flops=self._flops(w),
            rule=of_documents(
                Held.HEADS,
                2,
                among.told,
                cp=Move((*self._told, Held.SEQUENCE, Held.REPLICATED), Held.SEQUENCE),
            ),
        )

    def backward(self, w: GraphWriter) -> None:
        """Add what makes `dq` [S, B, H, D], `dk` and `dv` [S, B, G, D] of `d_context`."""
        self._bring(w, "attention.grad.keys", "keys_again")
        among, way, size = self.among, self.way, self._size(w)
        written, tokens = way.written(way.ranks - 1)

        def run(*read: Any) -> tuple[Tensor, Tensor]:
            told, (dout, heads, out, lse, states, brought) = among.apart(read)
            q, _, _ = self.cut(heads)
            home = brought.new_zeros(brought.shape, dtype=way.dtype)
            found = []
            for (piece, rows, first), state in zip(self._pieces(len(q)), states, strict=True):
                k, v = self._keys(brought, piece, first)
                own = dout[rows], q[rows], k, v, out[rows], lse[..., rows].contiguous()
                inside = self._inside(told, piece, first, q)
                part, dk, dv = among.backward(*own, state, inside)
                found.append(part)
                self._add(home, piece, first, dk, dv)
            return torch.cat(found), home

        w.compute(
            "attention.grad",
            (
                *among.told,
                *("d_context", self.read, "context", "lse", "attention_state"),
                way.slot(1, "keys_again"),
            ),
            {
                "dq": w.sizes.wide(self.heads.queries * self.heads.size),
                written: tokens * size * way.dtype.itemsize / w.sizes.dtype.itemsize,
            },
            run,
            flops=self.backward_flops * self._flops(w),
            rule=of_documents(
                Held.HEADS,
                6,
                among.told,
                cp=Move(
                    (*self._told, *[Held.SEQUENCE] * 5, Held.REPLICATED),
                    (Held.SEQUENCE, Held.PARTIAL),
                ),
            ),
        )
        way.send(w, way.ranks - 1, size)
        w.compute(
            "attention.grad.join",
            ("d_keys_home", self.read),
            {"dk": size / 2, "dv": size / 2},
            lambda home, heads: (home[0].to(heads.dtype), home[1].to(heads.dtype)),
            moved=2 * size,
        )

    @property
    def _told(self) -> list[Held]:
        return [Held.SEQUENCE] * len(self.among.told)

    def _flops(self, w: GraphWriter) -> float:
        return self.heads.flops(w.sizes.length, self.among.window)

    def _size(self, w: GraphWriter) -> float:
        """Bytes per token of keys and values."""
        return w.sizes.wide(2 * self.heads.groups * self.heads.size)

    def _bring(self, w: GraphWriter, name: str, write: str) -> None:
        """Add what packs this rank's keys and values, and what brings those of all."""
        cut, size = self.cut, self._size(w)
        w.compute(
            name,
            (self.read,),
            {f"{write}_0": size},
            lambda heads: torch.stack(cut(heads)[1:]),
            moved=2 * size,
        )
        self.way.bring(w, 1, write, size)

    def _pieces(self, length: int) -> Iterator[tuple[int, slice, int]]:
        """This rank's pieces, their rows among its tokens, and the first token that they see."""
        window, size = self.among.window, length // 2
        assert window is not None
        for number, piece in enumerate(zigzag.pieces_of(self.way.rank, self.way.ranks)):
            rows = slice(number * size, (number + 1) * size)
            yield piece, rows, max(0, piece * size - window + 1)

    def _inside(self, told: Told, piece: int, first: int, q: Tensor) -> Told:
        """What a micro-batch says of documents, where a piece attends from the token `first` on."""
        if told[0] is None:
            return told
        whole, size = told[0][-1], len(q) // 2
        length, last = 2 * self.way.ranks * size, (piece + 1) * size
        queries = _between(whole.queries, length, piece * size, last)
        keys = _between(whole.keys, length, first, last)
        runs = Runs(queries, keys, min(whole.longest, last - first))
        return ((runs,), *told[1:])

    def _keys(self, brought: Tensor, piece: int, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values from the token `first` to the last of a piece, from those of all."""
        parts = [brought[where] for where in self._places(brought, piece, first)]
        k, v = torch.cat(parts, dim=1)
        return k, v

    def _add(self, home: Tensor, piece: int, first: int, dk: Tensor, dv: Tensor) -> None:
        """Add gradients by what `_keys` gave to those by the keys of all."""
        done = 0
        for where in self._places(home, piece, first):
            own = home[where]
            rows = slice(done, done + own.shape[1])
            own[0] += dk[rows]
            own[1] += dv[rows]
            done = rows.stop

    def _places(self, every: Tensor, piece: int, first: int) -> Iterator[tuple[slice, slice]]:
        """Where these tokens are in `every` [2 C, S, B, G, D], in their order."""
        ranks, size = self.way.ranks, every.shape[1] // 2
        for one in range(first // size, piece + 1):
            rank, late = (one, 0) if one < ranks else (2 * ranks - 1 - one, size)
            begin = max(0, first - one * size)
            yield slice(2 * rank, 2 * rank + 2), slice(late + begin, late + size)


def _between(ends: Tensor, length: int, start: int, stop: int) -> Tensor:
    """Where documents end in one row of the tokens from `start` to `stop` of all samples.

    `ends` says it of whole samples of `length` tokens, after a 0.
    """
    sample = (ends[1:] - 1) // length
    of_sample = ends[1:] - sample * length
    places = sample * (stop - start) + of_sample.clamp(start, stop) - start
    return torch.cat([ends[:1], places])
