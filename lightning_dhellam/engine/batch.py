"""Cuts a batch into micro-batches and makes their slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from lightning_dhellam.engine.documents import Documents, runs_of
from lightning_dhellam.engine.inputs import pinned
from lightning_dhellam.engine.masks import MASK
from lightning_dhellam.engine.weights import IGNORED, Everyone, weights_everywhere, weights_here
from lightning_dhellam.kernels import dropout
from lightning_dhellam.parallel import zigzag
from lightning_dhellam.parallel.tally import Tally
from lightning_dhellam.parallel.topology import Topology


@dataclass(frozen=True)
class MicroBatch:
    """What the operators read of one micro-batch.

    Attributes:
        slots: `batch.tokens` [B, S] int64; `batch.positions` [S, B] int64, where in its document
            each token stands, and `batch.places` [S / TP], where in the sequence those stand that
            this rank has between the layers; `batch.documents`, the `Runs` of each hop of
            attention, or None where every sample is one document; `batch.labels` [S, B] int64,
            never negative; `batch.weights` [S, B] fp32, what each token's loss counts, with a sum
            over the whole batch of 1, or of the scale of the loss; `batch.key`, the random key of
            what this rank alone computes, and `batch.whole_key`, of what all ranks with these
            samples compute alike or by places, both None in evaluation; `batch.data`, the user's
            mapping cut to this micro-batch;
            `batch.share`, its part of the batch's samples; `batch.padding` [S / TP, B] bool, which
            of the tokens that this rank has between the layers are padding, None without labels;
            `batch.token_share`, what each of the others is of the batch; `batch.tally`, what
            operators of all micro-batches add up. What the device is still to be given is a `Slot`,
            which says when it is there. Where the whole batch is that of several ranks,
            `batch.counts` [2, S, B] is what its weights are made from.
        tokens: number of tokens, B * S.
    """

    slots: dict[str, Any]
    tokens: int

    def apart(self) -> Self:
        """The same, but what operators add up counts for no step."""
        return replace(self, slots=self.slots | {"batch.tally": Tally()})


def cut(
    batch: Mapping[str, Any],
    size: int,
    *,
    device: torch.device,
    seed: int,
    step: int,
    topology: Topology,
    targets: bool = True,
    everyone: Everyone | None = None,
    scale: Tensor | None = None,
    documents: Documents | None = None,
    own_labels: bool = False,
) -> list[MicroBatch]:
    """Cut a batch into micro-batches of at most `size` samples, and this rank's part of sequences.

    Each token counts the same, whichever micro-batch it falls into: the loss of the batch is the
    mean over all tokens that count, so `size` changes neither loss nor gradients, and the last
    micro-batch may be smaller.

    With context parallelism this rank takes its two pieces of each sequence (`parallel.zigzag`),
    so that S is then the length of both together.

    Padding is what stands behind the last token of a sample that counts, or what `attention_mask`
    [B, S] says: no loss depends on it.

    Args:
        batch: `tokens` [B, S] and, for a loss, `labels` [B, S]; optionally `loss_mask` [B, S].
            Every other tensor whose first dimension is B is cut as well, and along the sequence if
            its second is S.
        size: samples per micro-batch.
        device: where the slots are needed.
        seed: of the run; with `step`, this rank's place in its pipeline stage and the micro-batch
            it determines all random numbers.
        step: of the run.
        topology: this rank's place among those that share the layers and the samples.
        targets: whether labels are read, if there are any.
        everyone: ranks whose batches together are the whole one; None where this one is. With them
            every rank's batch must have labels, and every rank must call this.
        scale: what the loss is multiplied by, a scalar on the device; None for 1.
        documents: what the samples are made of; None where each is one document.
        own_labels: whether labels may mean anything, so that nothing is known to be padding.
    """
    samples, length = batch["tokens"].shape
    share = (topology.cp_rank, topology.cp_size)
    places = zigzag.places(length, *share, device)
    own = places.chunk(topology.tp_size)[topology.tp_rank]
    targets = targets and batch.get("labels") is not None
    padding = _padding(batch, device, own_labels) if targets else None
    if padding is not None and share[1] > 1:
        padding = zigzag.own_part(padding, 1, *share)
    batch, positions = _of_part(batch, share, device, documents)

    def on_device(value: Tensor) -> Tensor:
        return pinned(value).to(device, non_blocking=True)

    tokens = batch["tokens"]
    rank, sharing = topology.rank_in_stage, topology.tp_size * topology.cp_size
    pieces, tally = [], Tally()
    for index, start in enumerate(range(0, samples, size)):
        rows = slice(start, min(start + size, samples))
        slots: dict[str, Any] = {
            "batch.positions": positions[rows].t().contiguous(),
            "batch.places": own,
            "batch.every_place": places,
            "batch.documents": documents and runs_of(documents, rows, share, on_device),
            # A copy: kernels are chosen by the place of their arguments too, and a part of a batch
            # may begin anywhere.
            "batch.tokens": tokens[rows].to(device, non_blocking=True, copy=True),
            "batch.key": dropout.derive_key(seed, step, rank, index),
            "batch.whole_key": dropout.derive_key(seed, step, rank // sharing, index),
            "batch.data": {name: _rows(value, rows, samples) for name, value in batch.items()},
            "batch.padding": padding
            if padding is None
            else padding[rows].t().chunk(topology.tp_size)[topology.tp_rank].contiguous(),
            "batch.tally": tally,
        }
        pieces.append(MicroBatch(slots, tokens[rows].numel()))
    if padding is not None:
        _add_targets(pieces, batch, padding, everyone, scale)
    return pieces


def _padding(batch: Mapping[str, Any], device: torch.device, own_labels: bool) -> Tensor:
    """Which tokens of whole sequences are padding: [B, S] bool on the device."""
    labels, mask = batch["labels"].to(device, non_blocking=True), batch.get("loss_mask")
    if own_labels:
        return torch.zeros(labels.shape, dtype=torch.bool, device=device)
    counts = labels != IGNORED
    if mask is not None:
        counts = counts & (mask.to(device, non_blocking=True) != 0)
    padding = counts.flip(1).cumsum(1).flip(1) == 0
    seen = batch.get(MASK)
    if not isinstance(seen, Tensor) or seen.shape != labels.shape:
        return padding
    return padding | (seen.to(device, non_blocking=True) == 0)


def blank(piece: MicroBatch) -> MicroBatch:
    """The same micro-batch, but that nothing of it counts in the loss."""
    slots = dict(piece.slots)
    if "batch.labels" in slots:
        slots["batch.weights"] = torch.zeros_like(slots["batch.labels"], dtype=torch.float32)
        slots["batch.share"] = slots["batch.token_share"] = 0.0
    return replace(piece, slots=slots)


def _of_part(
    batch: Mapping[str, Any],
    share: tuple[int, int],
    device: torch.device,
    documents: Documents | None,
) -> tuple[Mapping[str, Any], Tensor]:
    """The batch with the tokens of one of the ranks that share sequences, and their positions.

    They are on the device, since a part that was cut on the host would be copied there with a wait.
    """
    samples, length = batch["tokens"].shape
    if documents is not None and documents.positions is not None:
        positions = pinned(documents.positions).to(device, non_blocking=True)
    else:
        positions = torch.arange(length, device=device).expand(samples, length)
    if share[1] == 1:
        return batch, positions
    # Those of the user say the same, but may have another shape.
    given = {**batch, "position_ids": positions}
    of_part = {
        name: zigzag.own_part(value.to(device, non_blocking=True), 1, *share)
        if isinstance(value, Tensor) and value.shape[:2] == (samples, length)
        else value
        for name, value in given.items()
    }
    return of_part, of_part["position_ids"]


def _add_targets(
    pieces: Sequence[MicroBatch],
    batch: Mapping[str, Any],
    padding: Tensor,
    everyone: Everyone | None,
    scale: Tensor | None,
) -> None:
    """Give each micro-batch its labels, and what its tokens and samples count.

    `padding` is [B, S], on the device.
    """
    device = padding.device
    labels = batch["labels"].to(device, non_blocking=True).t()
    counts = (labels != IGNORED).float()
    mask = batch.get("loss_mask")
    if mask is not None:
        counts = counts * mask.to(device, torch.float32, non_blocking=True).t()
    counts = torch.stack([counts, padding.t().logical_not().float()])
    sizes = [len(piece.slots["batch.tokens"]) for piece in pieces]
    if everyone is None:
        weights = weights_here(counts, sizes, scale)
    else:
        weights = weights_everywhere(counts, sizes, everyone, scale)
    parts = labels.clamp_min(0).split(sizes, dim=1)
    for piece, part, weight in zip(pieces, parts, weights, strict=True):
        piece.slots["batch.labels"] = part.clone(memory_format=torch.contiguous_format)
        piece.slots["batch.weights"], piece.slots["batch.share"] = weight.tokens, weight.samples
        piece.slots["batch.token_share"] = weight.each
        if everyone is not None:
            piece.slots["batch.counts"] = counts


def _rows(value: Any, rows: slice, samples: int) -> Any:
    is_batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == samples
    return value[rows] if is_batched else value
