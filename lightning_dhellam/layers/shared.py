"""Attention over sequences that context-parallel ranks share: one block of keys at a time.

Each of the C ranks has two pieces of the sequence (`parallel.zigzag`). It attends to its own keys
first, and in hop k to those of the rank that is k places before it: all its queries to the first
piece of a rank with a lower number, those of its second piece to both of a rank with a higher one.
So every hop costs every rank the same; sizes of slots are upper bounds, the same on all ranks. Keys
come by one of two ways (`ways`):

    ring         compute   keys | block 0 | block 1  merge | block 2  merge
                 cp             | keys 1  | keys 2
    all_gather   compute   keys | block 0           | block 1  merge  block 2  merge
                 cp             | keys of all ranks

Backward walks the same hops with the merged output and log-sum-exp; gradients by queries are added
up in fp32.

Shapes: S tokens of this rank, T of a hop's keys, B batch, H query heads, G key and value heads, D
head size. Keys and values travel together: [2, S, B, G, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.heads import Heads, Parts
from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.among import Among
from lightning_dhellam.layers.rules import of_documents
from lightning_dhellam.layers.ways import Way
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.plan.layout import Held, Move, Rule

_OWN = Held.SEQUENCE


@dataclass(frozen=True)
class SharedAttention:
    """Causal attention among the tokens of all ranks that share a sequence.

    Attributes:
        heads: of this rank.
        among: attends to a block of keys.
        read: the slot of the heads.
        cut: takes queries, keys and values out of it.
        kernels: what computes the operators.
        way: by which keys come, and their gradients go home.
        backward_flops: of backward in those of forward.
    """

    heads: Heads
    among: Among
    read: str
    cut: Callable[[Tensor], Parts]
    kernels: Kernels
    way: Way
    backward_flops: float

    def forward(self, w: GraphWriter) -> None:
        """Add what makes `context` [S, B, H*D] and `lse` [B, H, S]."""
        self._pack(w, "attention.keys", "keys")
        for hop in range(self.way.ranks):
            self.way.bring(w, hop + 1, "keys", self._travelling_size)
            self._block(w, hop)
            if hop:
                self._merge(w, hop)

    def backward(self, w: GraphWriter) -> None:
        """Add what makes `dq` [S, B, H, D], `dk` and `dv` [S, B, G, D] of `d_context`."""
        self._pack(w, "attention.grad.keys", "keys_again")
        self.way.bring(w, 1, "keys_again", self._travelling_size)
        self._own_block_grad(w)
        for hop in range(1, self.way.ranks):
            if hop > 1:
                self.way.send(w, hop - 1, self._keys_size(w))
            self.way.bring(w, hop + 1, "keys_again", self._travelling_size)
            self._block_grad(w, hop)
        self.way.send(w, self._last, self._keys_size(w))
        self._join(w)

    @property
    def _last(self) -> int:
        return self.way.ranks - 1

    @property
    def _growth(self) -> float:
        """FLOPs of a hop per token of this rank, for each token of the whole sequence."""
        return self.heads.flops(1) / self.way.ranks

    def _keys_size(self, w: GraphWriter) -> float:
        """Bytes per token of keys and values."""
        return w.sizes.wide(2 * self.heads.groups * self.heads.size)

    @property
    def _travelling_size(self) -> float:
        """The same as they travel."""
        return 2 * self.heads.groups * self.way.travelling.size(self.heads.size)

    def _merged(self, hop: int) -> tuple[str, str]:
        """Slots of output and log-sum-exp over the keys of all hops to this one."""
        if hop == self._last:
            return "context", "lse"
        return (f"context_to_{hop}", f"lse_to_{hop}") if hop else _of(0)

    def _rows(self, q: Tensor, hop: int) -> slice:
        """The queries that attend to the keys of a hop."""
        return slice(len(q) // 2 if self.way.is_late(hop) else 0, None)

    def _pack(self, w: GraphWriter, name: str, write: str) -> None:
        """Add this rank's own keys and values, as they travel."""
        cut, pack, size = self.cut, self.way.travelling.pack, self._travelling_size
        w.compute(
            name,
            (self.read,),
            {f"{write}_0": size},
            lambda heads: pack(*cut(heads)[1:]),
            moved=self._keys_size(w) + size,
        )

    def _block(self, w: GraphWriter, hop: int) -> None:
        """Add attention to the keys of a hop."""
        among, way, queries = self.among, self.way, self.heads.queries

        def run(*read: Any) -> tuple[Tensor, Tensor, Any]:
            told, (heads, *brought) = among.apart(read)
            q, k, v = self.cut(heads)
            if brought:
                q, (k, v) = q[self._rows(q, hop)], way.keys(brought[0], hop)
            return among.forward(q, k, v, told, hop)

        out, lse = _of(hop)
        keys = (way.slot(hop, "keys"),) if hop else ()
        w.compute(
            f"attention.{hop}",
            (*among.told, self.read, *keys),
            {
                out: w.sizes.wide(queries * self.heads.size),
                lse: 4.0 * queries,
                f"attention_state_{hop}": 0.0,
            },
            run,
            growing=self._growth,
            rule=self._block_rule((_OWN, *[way.held] * len(keys)), _OWN),
        )

    def _merge(self, w: GraphWriter, hop: int) -> None:
        """Add the block of a hop to those before it: in fp32, but for the last."""
        merge = self.kernels.merge.forward
        dtype = w.sizes.dtype if hop == self._last else torch.float32
        channels = self.heads.queries * self.heads.size
        out, lse = self._merged(hop)
        size = channels * dtype.itemsize
        w.compute(
            f"attention.merge.{hop}",
            (*self._merged(hop - 1), *_of(hop)),
            {out: size, lse: 4.0 * self.heads.queries},
            lambda out, lse, other, other_lse: merge(out, lse, other, other_lse, dtype),
            moved=2 * size + w.sizes.wide(channels),
        )

    def _own_block_grad(self, w: GraphWriter) -> None:
        """Add what attention to this rank's own keys adds to the gradients."""
        among, key = self.among, self._keys_size(w) / 2

        def run(*read: Any) -> Parts:
            told, (dout, heads, out, lse, state) = among.apart(read)
            dq, dk, dv = among.backward(dout, *self.cut(heads), out, lse, state, told)
            return dq.float(), dk, dv

        w.compute(
            "attention.grad.0",
            self._grad_reads(0),
            {"dq_0": 4.0 * self.heads.queries * self.heads.size, "dk_own": key, "dv_own": key},
            run,
            growing=self.backward_flops * self._growth,
            rule=self._block_rule((_OWN,) * 5, _OWN),
        )

    def _block_grad(self, w: GraphWriter, hop: int) -> None:
        """Add what attention to the keys of a hop adds to the gradients."""
        among, way = self.among, self.way
        dtype = w.sizes.dtype if hop == self._last else torch.float32

        def run(*read: Any) -> tuple[Tensor, Tensor]:
            told, (dout, heads, out, lse, state, dq, brought, *collected) = among.apart(read)
            q, _, _ = self.cut(heads)
            k, v = way.keys(brought, hop)
            rows = self._rows(q, hop)
            own = (dout[rows], q[rows], k, v, out[rows], lse[..., rows].contiguous())
            part, dk, dv = among.backward(*own, state, told, hop)
            # In place: nothing else reads what the hops before have added up.
            dq[rows] += part
            return dq.to(dtype), way.collect(dk, dv, hop, len(q), *collected)

        collected = way.collected(hop)
        written, tokens = way.written(hop)
        size = tokens * 2 * self.heads.groups * self.heads.size * way.dtype.itemsize
        queries = self.heads.queries * self.heads.size * dtype.itemsize
        write = "dq" if hop == self._last else f"dq_{hop}"
        takes = [(written, slot) for slot in collected]
        if dtype is torch.float32:
            takes.append((write, f"dq_{hop - 1}"))
        reads = (_OWN,) * 6 + (way.held,) + (way.collected_held,) * len(collected)
        w.compute(
            f"attention.grad.{hop}",
            (*self._grad_reads(hop), f"dq_{hop - 1}", way.slot(hop, "keys_again"), *collected),
            {write: queries, written: size},
            run,
            growing=self.backward_flops * self._growth,
            takes=tuple(takes),
            rule=self._block_rule(reads, (_OWN, way.collected_held)),
        )

    def _grad_reads(self, hop: int) -> tuple[str, ...]:
        state = f"attention_state_{hop}"
        return *self.among.told, "d_context", self.read, "context", "lse", state

    def _block_rule(self, reads: tuple[Held, ...], writes: Held | tuple[Held, ...]) -> Rule:
        """The rule of a block: it takes keys as they come, and of all else must have the whole."""
        told = self.among.told
        cp = Move((*(_OWN,) * len(told), *reads), writes)
        return of_documents(Held.HEADS, len(reads), told, cp=cp)

    def _join(self, w: GraphWriter) -> None:
        """Add the gradients by this rank's keys: of its own queries and of all others'."""
        key = self._keys_size(w) / 2

        def run(dk: Tensor, dv: Tensor, home: Tensor) -> tuple[Tensor, Tensor]:
            return (dk + home[0]).to(dk.dtype), (dv + home[1]).to(dv.dtype)

        w.compute(
            "attention.grad.join",
            ("dk_own", "dv_own", "d_keys_home"),
            {"dk": key, "dv": key},
            run,
            moved=6 * key,
        )


def _of(hop: int) -> tuple[str, str]:
    """Slots of output and log-sum-exp over the keys of one hop."""
    return f"context_of_{hop}", f"lse_of_{hop}"
