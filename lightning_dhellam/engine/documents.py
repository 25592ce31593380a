"""Documents packed into samples: what a batch says of them, in the words of several trainers.

A sample may hold documents one behind the other, none of which attends to another. Keys say so in
several ways, and each becomes the same: where documents begin.

    position_ids     0 1 2 0 1 0 1 2    Hugging Face's DataCollatorWithFlattening, Megatron
    seq_idx          0 0 0 1 1 2 2 2    its seq_idx, and segment_ids, document_ids
    cu_seqlens       0 3 5 8            flash-attn, torch; with several samples in a row of all
    attention_mask   1 1 1 2 2 3 3 3    or [S, S], causal within each document, as Megatron's
                     0 0 0 1 1 1 1 1    padding is a document of its own; positions go on

Megatron's reset_attention_mask alone parts documents whose positions go on, and reset_position_ids
alone restarts positions where attention does not stop; a batch says so by segments or a mask beside
its positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.engine.masks import (
    COUNTS,
    MASK,
    begins_of_mask,
    is_numbered,
    on_host,
    pads_the_beginning,
    put_on_host,
)
from lightning_dhellam.kernels.packed_attention import Runs
from lightning_dhellam.parallel import zigzag

Batch = Mapping[str, Any]
POSITIONS = ("position_ids", "positions")
SEGMENTS = ("segment_ids", "sequence_ids", "document_ids", "seq_idx")
ENDS = (
    "cu_seqlens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seqlens_kv",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cu_seq_q",
    "cu_seq_k",
)
KEYS = (*POSITIONS, *SEGMENTS, *ENDS, MASK)
"""What may say where documents begin."""


class Documents(NamedTuple):
    """The documents of a batch of B samples of S tokens.

    Attributes:
        positions: of each token in its document, [B, S] int64 on the host; None for 0 to S-1.
        ends: for each sample where its documents end, ascending to S.
    """

    positions: Tensor | None
    ends: tuple[tuple[int, ...], ...]

    def are_packed(self, rows: slice) -> bool:
        """Whether one of these samples has several documents."""
        return any(len(ends) > 1 for ends in self.ends[rows])

    def unseen(self) -> Tensor:
        """What each token does not see of its sample: [B, S, S] bool on the host."""
        tokens = torch.arange(self.ends[0][-1])
        numbers = [torch.bucketize(tokens, torch.tensor(ends), right=True) for ends in self.ends]
        number = torch.stack(numbers)
        return ((number[:, :, None] == number[:, None]) & (tokens[:, None] >= tokens)).logical_not()


def remember(moved: Any, batch: Any) -> Any:
    """Have the keys of `moved`, a copy of `batch` on a device, be read on the host all the same.

    A value that is changed or cut later is read from the device, for which the host waits.
    """
    if isinstance(moved, dict) and isinstance(batch, Mapping):
        for name in (*KEYS, *COUNTS):
            value, original = moved.get(name), batch.get(name)
            if isinstance(value, Tensor) and isinstance(original, Tensor) and value is not original:
                put_on_host(value, original)
    return moved


def documents_of(batch: Batch) -> Documents | None:
    """What `batch`, which `check_batch` has passed, says of documents; None if that is nothing.

    Raises:
        ValueError: naming the key, if what it says cannot be, or differs from what another says.
    """
    said = {name: value for name in KEYS if (value := batch.get(name)) is not None}
    if not said:
        return None
    shape = tuple(batch["tokens"].shape)
    begins: dict[str, Tensor] = {}
    positions, of_positions = None, ""
    for name, value in said.items():
        value = _whole_numbers(name, value)
        if name in POSITIONS:
            found = _positions(name, value, shape, said.get(MASK))
            if positions is not None and not torch.equal(found, positions):
                raise ValueError(_differ(of_positions, name))
            positions, of_positions = found, name
        elif name == MASK:
            of_mask = begins_of_mask(value, batch)
            if of_mask is not None:
                begins[name] = of_mask
            if positions is None and tuple(value.shape) == shape and _pads_alone(value):
                # As Hugging Face's models, which count places from the first one, padding or not.
                positions, of_positions = torch.arange(shape[1]).expand(shape), name
        else:
            read = _begins_of_ends if name in ENDS else _begins_of_segments
            begins[name] = read(name, value, shape)
    return _settled(_alike(begins), begins, positions, of_positions, shape)


def runs_of(
    documents: Documents, rows: slice, share: tuple[int, int], place: Callable[[Tensor], Tensor]
) -> tuple[Runs, ...] | None:
    """Where the documents of some samples lie in each hop; None if each sample is one.

    Behind the hops, where ranks share sequences, comes where they lie in whole ones.

    Args:
        documents: of the whole batch.
        rows: the samples.
        share: this rank's number, and how many ranks share each sequence.
        place: brings a tensor to where the kernels read it.
    """
    if not documents.are_packed(rows):
        return None
    samples = documents.ends[rows]
    ends = torch.tensor([end for sample in samples for end in sample])
    sample = torch.tensor([b for b, found in enumerate(samples) for _ in found])
    length = samples[0][-1]
    meeting = [zigzag.that_meet(*share, hop) for hop in range(share[1])]
    if share[1] > 1:
        meeting.append((tuple(range(2 * share[1])),) * 2)
    pairs = [[_places(ends, sample, one, length, share[1]) for one in pair] for pair in meeting]
    longest = [int(torch.stack(pair).diff().max()) for pair in pairs]
    moved = place(torch.stack([torch.stack(pair) for pair in pairs]).int())
    return tuple(Runs(pair[0], pair[1], most) for pair, most in zip(moved, longest, strict=True))


def _places(ends: Tensor, sample: Tensor, pieces: Sequence[int], length: int, ranks: int) -> Tensor:
    """Where documents end in one row of the tokens that all samples have in some pieces."""
    size = length // (2 * ranks)
    ranges = [(piece * size, (piece + 1) * size) for piece in pieces]
    if ranks == 1:
        ranges = [(0, length)]
    places = sample * sum(stop - start for start, stop in ranges)
    for start, stop in ranges:
        places = places + ends.clamp(start, stop) - start
    return torch.cat([places.new_zeros(1), places])


def _settled(
    explicit: str,
    begins: Mapping[str, Tensor],
    positions: Tensor | None,
    of_positions: str,
    shape: tuple[int, ...],
) -> Documents | None:
    """What positions and all else say together."""
    plain = torch.arange(shape[1]).expand(shape)
    if positions is None:
        if not explicit:
            return None
        parts = begins[explicit]
        positions = plain - torch.where(parts, plain, 0).cummax(dim=1).values
    elif not explicit:
        parts = positions == 0
    else:
        parts, restarts = begins[explicit], positions == 0
        several = bool(parts[:, 1:].any()), bool(restarts[:, 1:].any())
        if not torch.equal(parts, restarts) and (all(several) or explicit in ENDS):
            raise ValueError(_differ(of_positions, explicit))
    if torch.equal(positions, plain):
        if not parts[:, 1:].any():
            return None
        positions = None
    ends = tuple((*row[1:].nonzero().flatten().add(1).tolist(), shape[1]) for row in parts)
    return Documents(positions, ends)


def _alike(begins: Mapping[str, Tensor]) -> str:
    """The key to go by, of several that say the same."""
    first = ""
    for name, found in begins.items():
        if first and not torch.equal(found, begins[first]):
            raise ValueError(_differ(first, name))
        first = first or name
    return first


def _differ(one: str, other: str) -> str:
    return (
        f"the batch has {one} and {other}, which say that documents begin in different places:"
        " leave one of them out"
    )


def _whole_numbers(name: str, value: Any) -> Tensor:
    """A value on the host."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the batch has {name} of type {type(value).__name__}: yield a tensor, or leave it out"
        )
    value = on_host(value)
    if name != MASK and (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"the batch has {name} in {value.dtype}: yield whole numbers")
    return value if name == MASK else value.long()


def _each(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[S], [1, S] or [B, S] as [B, S]."""
    if value.dim() not in (1, 2) or value.shape[-1] != shape[1] or len(value) not in (1, *shape):
        raise ValueError(
            f"the batch has {name} of shape {tuple(value.shape)}, and tokens {shape}: yield one for"
            f" each token, {shape}"
        )
    return value.expand(shape)


def _pads_alone(mask: Tensor) -> bool:
    """Whether [B, S] has padding at the beginning, and no numbers of documents."""
    return pads_the_beginning(mask) and not is_numbered(mask)


def _positions(name: str, value: Tensor, shape: tuple[int, ...], mask: Any) -> Tensor:
    value = _without_padding(_each(name, value, shape), mask)
    if (value[:, 0] != 0).any():
        raise ValueError(
            f"the batch has {name} that begin a sample with {int(value[value[:, 0] != 0][0, 0])}:"
            " a sample begins with a document, and a document at 0"
        )
    jumps = (value[:, 1:] != 0) & (value[:, 1:] != value[:, :-1] + 1)
    for sample, token in _first(jumps):
        before, after = value[sample, token : token + 2].tolist()
        raise ValueError(
            f"the batch has {name} that go from {before} to {after} in sample {sample}: in a"
            " document they ascend by 1, and the next one begins at 0"
        )
    return value


def _without_padding(positions: Tensor, mask: Any) -> Tensor:
    """Positions [B, S] that say of padding what a mask does, as trainers fill it in variously."""
    if not isinstance(mask, Tensor) or mask.shape != positions.shape:
        return positions
    mask = _whole_numbers(MASK, mask)
    plain = torch.arange(positions.shape[1]).expand(positions.shape)
    behind = torch.where(mask != 0, plain + 1, 0).cummax(dim=1).values
    padding = plain - behind
    if not (is_numbered(mask) or pads_the_beginning(mask)):  # the end of the last document
        padding = padding + torch.where(
            behind > 0, positions.gather(1, behind - 1 + (behind == 0)) + 1, 0
        )
    return torch.where(mask != 0, positions, padding)


def _begins_of_segments(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    value = _each(name, value, shape)
    begins = torch.ones(shape, dtype=torch.bool)
    begins[:, 1:] = value[:, 1:] != value[:, :-1]
    for sample, row in enumerate(value):
        numbers = row[begins[sample]]
        if len(numbers.unique()) < len(numbers):
            raise ValueError(
                f"the batch has {name} in sample {sample} with a number that comes again after"
                " another: a document is one piece, so give each a number of its own"
            )
    return begins


def _begins_of_ends(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[N + 1] in a row of all samples, or [B, n + 1] by sample."""
    samples, length = shape
    by_sample = value.dim() == 2 and len(value) == samples
    if not by_sample and (value.dim() != 1 or not len(value)):
        raise ValueError(
            f"the batch has {name} of shape {tuple(value.shape)}: yield [N + 1], from 0 to the"
            f" {samples * length} tokens of the batch, or by sample [{samples}, n + 1]"
        )
    total = length if by_sample else samples * length
    begins = torch.zeros(samples if by_sample else 1, total + 1, dtype=torch.bool)
    for row, found in zip(value.view(-1, value.shape[-1]), begins, strict=True):
        first, last = int(row[0]), int(row[-1])
        for _, token in _first((row[1:] < row[:-1])[None]):
            before, after = row[token : token + 2].tolist()
            raise ValueError(f"the batch has {name} that do not ascend: {before}, then {after}")
        if (first, last) != (0, total):
            raise ValueError(
                f"the batch has {name} from {first} to {last}: they begin at 0 and end at the"
                f" number of tokens{' of a sample' if by_sample else ''}, {total}"
            )
        found[row] = True
    begins = begins[:, :-1].reshape(shape)
    for sample in range(1, samples):
        if not begins[sample, 0]:
            raise ValueError(
                f"the batch has {name} with a document that crosses {sample * length}, where sample"
                f" {sample} begins: documents end where their sample does"
            )
    return begins


def _first(wrong: Tensor) -> Iterator[list[int]]:
    """Sample and token of the first that is true in [B, S], if there is one."""
    yield from wrong.nonzero()[:1].tolist()
