"""CUDA streams that only keep the books: what has happened before the next operator of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

Moment = tuple[int, int]
"""A stream and the number of an operator on it."""


class Streams:
    """The streams of a device, and what they know of each other.

    Attributes:
        known: of each stream, how many operators of each other one have ended for it.
        current: stream.
        slept: streams that were held up.
    """

    def __init__(self) -> None:
        self.known: dict[int, dict[int, int]] = defaultdict(dict)
        self.current = 0
        self.slept: list[int] = []
        self._count = 0

    def knows(self, stream: int, moment: Moment) -> bool:
        """Whether an operator has ended for what is launched next on `stream`."""
        return self.known[stream].get(moment[0], 0) >= moment[1]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch make and use these streams and their events."""
        streams = self

        class Event:
            def record(self, stream: Stream) -> None:
                self.known = dict(streams.known[stream.number])

        class Stream:
            def __init__(self, *_: Any, **__: Any) -> None:
                self.number = streams._count
                streams._count += 1

            def wait_event(self, event: Event) -> None:
                mine = streams.known[self.number]
                for stream, number in event.known.items():
                    mine[stream] = max(mine.get(stream, 0), number)

        @contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, streams.current = streams.current, stream.number
            try:
                yield
            finally:
                streams.current = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: streams.slept.append(streams.current))
