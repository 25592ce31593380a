"""Files of conversations, and the rows of tokens that they are packed into."""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dhellam.data.chat import ChatTemplate, Message
from lightning_dhellam.files import save_text

TOO_LONG = ("truncate", "drop")
"""What may become of conversations that are longer than a sample."""

IGNORED = -100
"""Label of a token that does not count, as in Hugging Face and torch."""


class Counts(NamedTuple):
    """How many conversations there were, and what became of them."""

    read: int = 0
    empty: int = 0
    silent: int = 0
    too_long: int = 0

    def said(self, path: str | Path, too_long: str, kept: int, rows: int) -> str:
        """In a line."""
        left_out = [
            f"{count} {what}"
            for count, what in (
                (self.empty, "empty"),
                (self.silent, "without what the assistant says"),
                (self.too_long if too_long == "drop" else 0, "too long"),
            )
            if count
        ]
        cut = f"; {self.too_long} truncated" if too_long == "truncate" and self.too_long else ""
        left = f"; left out: {', '.join(left_out)}" if left_out else ""
        return f"{path}: {kept} of {self.read} conversations in {rows} samples{left}{cut}"


@dataclass(frozen=True)
class Conversations:
    """Encoded conversations, one behind the other.

    Attributes:
        ids: tokens of all, int32.
        counts: which of them the assistant has said.
        ends: where each conversation ends among them, int64.
        numbers: a `Counts`.
    """

    ids: numpy.ndarray
    counts: numpy.ndarray
    ends: numpy.ndarray
    numbers: numpy.ndarray

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        found: list[int] = numpy.diff(self.ends, prepend=0).tolist()
        return found

    def save(self, folder: Path) -> None:
        """Write them into a folder."""
        for field in fields(self):
            numpy.save(folder / f"{field.name}.npy", getattr(self, field.name))
        save_text(folder / "format", "1\n")

    @classmethod
    def load(cls, folder: Path) -> Conversations:
        """What `save` has written; the tokens stay on disk until they are read."""
        return cls(
            *(numpy.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(cls))
        )


def encode_file(
    path: str | Path, template: ChatTemplate, sequence_length: int, too_long: str
) -> Conversations:
    """Read a file of conversations, and make tokens of them.

    Left out are those without messages, those in which nothing counts, and with `drop` those of
    more tokens than `sequence_length`, which are cut off there with `truncate`.

    Raises:
        ValueError: a line is no conversation, or the template refuses it; names file and line.
    """
    ids: list[numpy.ndarray] = []
    counts: list[numpy.ndarray] = []
    read = empty = silent = long = 0
    for where, messages in _messages(Path(path)):
        read += 1
        if not messages:
            empty += 1
            continue
        encoded = template.encode(messages, where)
        if len(encoded.ids) > sequence_length:
            long += 1
            if too_long == "drop":
                continue
        # The first token is predicted by none.
        said = numpy.array(encoded.counts[:sequence_length], dtype=bool)
        if not said[1:].any():
            silent += 1
            continue
        ids.append(numpy.array(encoded.ids[:sequence_length], dtype=numpy.int32))
        counts.append(said)
    return Conversations(
        numpy.concatenate(ids or [numpy.empty(0, numpy.int32)]),
        numpy.concatenate(counts or [numpy.empty(0, bool)]),
        numpy.cumsum([len(one) for one in ids], dtype=numpy.int64),
        numpy.array(Counts(read, empty, silent, long)),
    )


def _messages(path: Path) -> Iterator[tuple[str, list[Message]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield (where := f"{path}:{number}"), _of_line(line, where)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): convert it") from error


def _of_line(line: str, where: str) -> list[Message]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise ValueError(
            f"{where} is no conversation: give"
            ' {"messages": [{"role": "user", "content": "…"}, …]} on each line'
        )
    return messages


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which documents go into which row of `room` tokens: the longest first, where they fit best.

    Every length is at most `room`.
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = defaultdict(list)
    spaces: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[document]
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), room
            rows.append([])
        else:
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del spaces[place]
        rows[row].append(document)
        left = space - length
        if left and not by_space[left]:
            insort(spaces, left)
        if left:
            by_space[left].append(row)
    return rows


class PackedConversations(Dataset[dict[str, Tensor]]):
    """Rows of conversations, none of which attends to another.

    A row has `tokens`, `labels` and `position_ids`, int64 [S]; labels are the tokens one position
    later that the assistant has said, and else -100. What is left of a row is padding.
    """

    def __init__(
        self, conversations: Conversations, sequence_length: int, seed: int, padding: int = 0
    ) -> None:
        self._conversations = conversations
        self._length = sequence_length
        self._padding = padding
        rows = packed(conversations.lengths, sequence_length)
        order = numpy.random.RandomState(seed % 2**32).permutation(len(rows))
        self._rows = [rows[number] for number in order]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.full((self._length,), self._padding)
        labels = torch.full((self._length,), IGNORED)
        positions = torch.arange(self._length)
        place = 0
        for document in self._rows[index]:
            ids, counts = self._document(document)
            row = slice(place, place + len(ids))
            tokens[row] = ids
            labels[row][:-1] = torch.where(counts[1:], ids[1:], IGNORED)
            positions[place:] = torch.arange(self._length - place)
            place = row.stop
        return {"tokens": tokens, "labels": labels, "position_ids": positions}

    def _document(self, number: int) -> tuple[Tensor, Tensor]:
        found = self._conversations
        own = slice(int(found.ends[number - 1]) if number else 0, int(found.ends[number]))
        ids: Any = numpy.array(found.ids[own], dtype=numpy.int64)
        return torch.from_numpy(ids), torch.from_numpy(numpy.array(found.counts[own]))
