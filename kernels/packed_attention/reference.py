"""One document after the other, by plain attention: the ground truth, and the CPU path.

The host reads where documents end, so this is for tensors that are on the host themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.base import Backend
from lightning_dhellam.kernels.attention.sdpa import CpuFlash
from lightning_dhellam.kernels.packed_attention.base import (
    PackedBackend,
    Runs,
    in_a_row,
    in_samples,
)


class OneByOne(PackedBackend):
    """Each document as a sample of its own.

    Args:
        alone: attends within one document.
    """

    name = "cpu"

    def __init__(self, alone: Backend | None = None) -> None:
        self._alone = alone or CpuFlash()
        self.records = self._alone.records

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        batch, heads = q.shape[1:3]
        row, keys, values = map(in_a_row, (q, k, v))
        out = row.new_zeros(row.shape).flatten(1)
        lse = row.new_full((heads, len(row)), -torch.inf, dtype=torch.float32)
        states = {}
        for number, mine, theirs in _documents(runs):
            q, k, v = (part[:, None] for part in (row[mine], keys[theirs], values[theirs]))
            one, one_lse, states[number] = self._alone.forward(
                q, k, v, scale, causal=causal, window=window
            )
            out[mine], lse[:, mine] = one[:, 0], one_lse[0]
        of_samples = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        return in_samples(out, batch).contiguous(), of_samples.contiguous(), states

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = q.shape[1]
        row, keys, values, dout, out = map(in_a_row, (q, k, v, dout, out))
        lse = lse.transpose(0, 1).flatten(1)
        dq, dk, dv = (torch.zeros_like(part) for part in (row, keys, values))
        for number, mine, theirs in _documents(runs):
            parts = (dout[mine], row[mine], keys[theirs], values[theirs], out[mine])
            one_dout, q, k, v, one = (part[:, None] for part in parts)
            one_lse, kept = lse[None, :, mine].contiguous(), state[number]
            grads = self._alone.backward(
                one_dout, q, k, v, one, one_lse, kept, scale, causal=causal, window=window
            )
            dq[mine], dk[theirs], dv[theirs] = (grad[:, 0] for grad in grads)
        return in_samples(dq, batch), in_samples(dk, batch), in_samples(dv, batch)


def _documents(runs: Runs) -> Iterator[tuple[int, slice, slice]]:
    """The documents with queries and keys: their numbers, and where both lie in the rows."""
    queries, keys = pairwise(runs.queries.tolist()), pairwise(runs.keys.tolist())
    for number, (mine, theirs) in enumerate(zip(queries, keys, strict=True)):
        if mine[0] < mine[1] and theirs[0] < theirs[1]:
            yield number, slice(*mine), slice(*theirs)
