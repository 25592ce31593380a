"""Cuts a batch into micro-batches and makes their slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels import dropout
from lightning_dhellam.parallel.topology import Topology

IGNORED = -100
"""Label of a token that does not count, as in Hugging Face and torch."""


@dataclass(frozen=True)
class MicroBatch:
    """What the operators read of one micro-batch.

    Attributes:
        slots: `batch.tokens` [B, S] int64; `batch.labels` [S, B] int64, never negative;
            `batch.weights` [S, B] fp32, what each token's loss counts, with a sum of 1 over the
            whole batch; `batch.key`, the random key of what this rank alone computes, and
            `batch.whole_key`, of what all ranks with these samples compute alike, both None in
            evaluation; `batch.data`, the user's mapping cut to this micro-batch; `batch.share`, its
            part of the batch's samples.
        tokens: number of tokens, B * S.
    """

    slots: dict[str, Any]
    tokens: int


def cut(
    batch: Mapping[str, Any],
    size: int,
    *,
    device: torch.device,
    seed: int,
    step: int,
    topology: Topology,
    targets: bool = True,
) -> list[MicroBatch]:
    """Cut a batch of this rank into micro-batches of at most `size` samples.

    Each token counts the same, whichever micro-batch it falls into: the loss of the batch is the
    mean over all tokens that count, so `size` changes neither loss nor gradients, and the last
    micro-batch may be smaller.

    Args:
        batch: `tokens` [B, S] and, for a loss, `labels` [B, S]; optionally `loss_mask` [B, S].
            Every other tensor whose first dimension is B is cut as well.
        size: samples per micro-batch.
        device: where the slots are needed.
        seed: of the run; with `step`, this rank's place in its pipeline stage and the micro-batch
            it determines all random numbers.
        step: of the run.
        topology: this rank's place among those that share the layers and the samples.
        targets: whether labels are read, if there are any.
    """
    tokens = batch["tokens"]
    samples = tokens.shape[0]
    rank, sharing = topology.rank_in_stage, topology.tp_size * topology.cp_size
    labels, weights = _targets(batch, device) if targets else (None, None)
    pieces = []
    for index, start in enumerate(range(0, samples, size)):
        rows = slice(start, min(start + size, samples))
        slots: dict[str, Any] = {
            # A copy: kernels are chosen by the place of their arguments too, and a part of a batch
            # may begin anywhere.
            "batch.tokens": tokens[rows].to(device, non_blocking=True, copy=True),
            "batch.key": dropout.derive_key(seed, step, rank, index),
            "batch.whole_key": dropout.derive_key(seed, step, rank // sharing, index),
            "batch.share": (rows.stop - start) / samples,
            "batch.data": {name: _rows(value, rows, samples) for name, value in batch.items()},
        }
        if labels is not None and weights is not None:
            slots["batch.labels"] = labels[:, rows].clone(memory_format=torch.contiguous_format)
            slots["batch.weights"] = weights[:, rows].clone(memory_format=torch.contiguous_format)
        pieces.append(MicroBatch(slots, tokens[rows].numel()))
    return pieces


def _targets(batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Labels and weights [S, B] of the whole batch."""
    given = batch.get("labels")
    if given is None:
        return None, None
    labels = given.to(device, non_blocking=True).t()
    counts = (labels != IGNORED).float()
    mask = batch.get("loss_mask")
    if mask is not None:
        counts = counts * mask.to(device, torch.float32, non_blocking=True).t()
    # A batch in which nothing counts has loss 0, not 0 / 0.
    total = counts.sum()
    return labels.clamp_min(0), counts / torch.where(total > 0, total, torch.ones_like(total))


def _rows(value: Any, rows: slice, samples: int) -> Any:
    is_batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == samples
    return value[rows] if is_batched else value
