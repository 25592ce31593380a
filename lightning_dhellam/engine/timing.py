"""Times single operators on this rank's lanes, alone and two at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from math import inf
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_dhellam.engine.lanes import CYCLES, CudaLanes, hold
from lightning_dhellam.engine.tape import tensors
from lightning_dhellam.engine.tracks import Lanes
from lightning_dhellam.parallel.collectives import Pending, largest
from lightning_dhellam.parallel.link import CopyEngine
from lightning_dhellam.plan import Lane, Operator

_HEAD_START = 500_000
"""Cycles that the device idles while the host issues a measurement: about 0.3 ms. More on a host
that needs more."""
_LONGEST_HEAD_START = 32 * _HEAD_START
_FEWEST = 8
"""Rounds of operators that run for long."""
_FEW_LATE = 0.25
"""Share of samples that a host may be late for by chance: of more, its head start is too short."""


class Subject(NamedTuple):
    """An operator, and values for it to read."""

    operator: Operator
    values: Sequence[Any]


class Sustained(NamedTuple):
    """Times of operators that run for long.

    Attributes:
        share: share of the time in which they run.
        seconds: seconds of all of them running once.
        after: seconds of the communication that ran directly after them.
    """

    share: float
    seconds: float
    after: float


class OperatorTimer:
    """Times operators. Every rank must ask for the same measurements in the same order.

    Args:
        lanes: of this rank's device.
        group: ranks over which a time is the largest; None for this rank's own.
        repeats: samples of each measurement.
        warmup: runs before them.
    """

    def __init__(
        self, lanes: Lanes, group: dist.ProcessGroup | None, *, repeats: int = 7, warmup: int = 2
    ) -> None:
        self._lanes = lanes
        self._group = group
        self._repeats = repeats
        self._warmup = warmup
        self._time = self._on_cuda if self.on_cuda else self._on_cpu
        self._head_start = _HEAD_START
        self._pulse: torch.Tensor | None = None
        if isinstance(lanes, CudaLanes) and group is not None:
            self._pulse = torch.zeros(1, device=lanes.device)

    @property
    def on_cuda(self) -> bool:
        """Whether operators run on streams."""
        return isinstance(self._lanes, CudaLanes)

    @contextmanager
    def sharing(self, spare: bool) -> Iterator[None]:
        """Whether GEMMs that are timed inside leave processors to communication."""
        self._lanes.share(spare)
        try:
            yield
        finally:
            self._lanes.share(spare=False)

    def alone(self, subject: Subject) -> list[float]:
        """Return the seconds of each run while nothing else runs."""
        (samples,) = self._samples([subject])
        return samples

    def beside(self, communication: Subject, other: Subject) -> tuple[list[float], list[float]]:
        """Return the seconds of each from their common start to its own end.

        `other` computes, or communicates on another lane. Communication goes first, as a plan can
        ask for: started at one moment, now one and now the other would have the SMs.
        """
        first, second = self._samples([communication, other])
        return first, second

    def behind(
        self, communication: Subject, compute: Subject, lead: float
    ) -> tuple[list[float], list[float]]:
        """Return the seconds of each from its own start; communication's is `lead` seconds later.

        On CUDA only: on CPU computation holds up the host, which could not start anything.
        """
        assert isinstance(self._lanes, CudaLanes)
        first, second = self._samples([communication, compute], lead)
        return first, second

    def same_bits(self, subject: Subject) -> bool:
        """Whether an operator computes the same leaving processors to communication, and not.

        On every rank; where it cannot be asked to leave any, the answer is no.
        """
        if not (isinstance(self._lanes, CudaLanes) and self._lanes.processors):
            return False
        outcomes = []
        with torch.no_grad():
            for spare in (False, True):
                with self.sharing(spare):
                    outcomes.append(_outcome(subject))
        differ = float(not all(map(_equal_bits, *outcomes)))
        return not float(largest(torch.tensor([differ]).double(), self._group))

    def sustained(
        self,
        subjects: Sequence[Subject],
        seconds: float,
        pause: float,
        after: Sequence[tuple[Subject, Subject]] = (),
    ) -> Sustained:
        """Run compute operators again and again, with pauses of a share of each one's time.

        For so long that the device's clock has settled; the last quarter counts, and of it the
        medians, since some launches of a host that does other things too are late. Then run each
        communication of `after` beside its compute, before the clock can rise. On CUDA only.
        """
        assert isinstance(self._lanes, CudaLanes)
        with torch.no_grad():
            pauses = [0] * len(subjects)
            if pause:
                alone = [self._time([subject], 0.0)[0] for subject in subjects]
                pauses = [round(pause * CYCLES * short) for short in alone]
            begin = time.perf_counter()
            self._again(subjects, pauses, _FEWEST)
            # Of the host as well: it may need longer to issue small operators than they take. The
            # slowest rank's, as all must run a user's block that holds collectives equally often.
            own = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
            each_round = float(largest(own, self._group)) / _FEWEST
            events = self._again(subjects, pauses, max(_FEWEST, round(seconds / each_round)))
            # Twice, since the host may be late for one: times would be too long by as much.
            behind = sum(min(self._time(pair, 0.0)[0] for _ in range(2)) for pair in after)
        counted = events[len(events) * 3 // 4 - 1 :]
        runs = zip(*counted[1:], strict=True)
        each = sum(median(start.elapsed_time(end) for start, end in run) for run in runs)
        whole = median(one[0][0].elapsed_time(other[0][0]) for one, other in pairwise(counted))
        # While the clock falls, the medians of the parts may add up to more than that of the whole.
        share = min(1.0, each / whole)
        found = torch.tensor([share, each / 1000, behind], dtype=torch.float64)
        return Sustained(*largest(found, self._group).tolist())

    def _again(
        self, subjects: Sequence[Subject], pauses: Sequence[int], rounds: int
    ) -> list[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
        """Run all subjects in each round, with pauses of so many cycles behind them.

        Returns of each round and subject its start and its end, which the device has reached.
        """
        assert isinstance(self._lanes, CudaLanes)
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []
        for _ in range(rounds):
            events.append([])
            for subject, pause in zip(subjects, pauses, strict=True):
                start = _recorded()
                subject.operator.run(*subject.values)
                events[-1].append((start, _recorded()))
                if pause:
                    torch.cuda._sleep(pause)
        torch.cuda.synchronize(self._lanes.device)
        return events

    def _samples(self, subjects: Sequence[Subject], lead: float = 0.0) -> list[list[float]]:
        """Times of each subject, in samples for which the host was not late.

        What the host issues too late starts in another order than it is said to. Unless even the
        longest head start is too short for it, such a sample is taken again.
        """
        kept: list[list[float]] = []
        while len(kept) < self._repeats:
            rows = self._rows(subjects, lead, self._repeats - len(kept))
            if self._head_start < _LONGEST_HEAD_START:
                timely = [row for row in rows if not row[-1]]
                if len(rows) - len(timely) > _FEW_LATE * len(rows):
                    self._head_start *= 2
                rows = timely
            kept += rows
        *columns, _ = map(list, zip(*kept, strict=True))
        return columns

    def _rows(self, subjects: Sequence[Subject], lead: float, count: int) -> list[list[float]]:
        """Return samples: the time of each subject, and whether the host was late, 1 or 0."""
        rows: list[list[float]] = []
        failure: Exception | None = None
        with torch.no_grad():
            for _ in range(self._warmup + count):
                # A rank that fails goes on without the operators: the others still compare times.
                try:
                    rows.append(self._time([] if failure else subjects, lead))
                except Exception as error:
                    failure = error
        failed = [[inf] * (len(subjects) + 1)] * count
        rows = rows[self._warmup :] if failure is None else failed
        samples = largest(torch.tensor(rows, dtype=torch.float64), self._group)
        if failure is not None:
            raise failure
        if not torch.isfinite(samples).all():
            raise RuntimeError("it failed on another rank, whose message says why")
        return [[float(value) for value in row] for row in samples]

    def _on_cpu(self, subjects: Sequence[Subject], lead: float) -> list[float]:
        """Start communication, then compute inline; threads note when communication is done."""
        if self._group is not None:
            dist.barrier(self._group)
        ends: dict[int, float] = {}
        watchers = []
        start = time.perf_counter()
        for index, (operator, values) in enumerate(subjects):
            result = operator.run(*values)
            if isinstance(result, Pending) and result.work is not None:
                watcher = threading.Thread(target=_note, args=(result.work.wait, ends, index))
                watcher.start()
                watchers.append(watcher)
            else:
                ends[index] = time.perf_counter()
        for watcher in watchers:
            watcher.join()
        return [*(ends[index] - start for index in range(len(subjects))), 0.0]

    def _on_cuda(self, subjects: Sequence[Subject], lead: float) -> list[float]:
        """Start all behind one event, which the device reaches when all have been issued, unless
        the host is late. Communication goes first, unless it starts `lead` seconds later.
        """
        assert isinstance(self._lanes, CudaLanes)
        compute = self._lanes.stream(Lane.COMPUTE)
        go = torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(compute):
            torch.cuda._sleep(self._head_start)
            if self._pulse is not None:
                # Ranks are apart by as much as their hosts: let their devices meet.
                dist.all_reduce(self._pulse, group=self._group)
            go.record()
        times = []
        for operator, values in subjects:
            stream = self._lanes.stream(*operator.track)
            stream.wait_event(go)
            start = go
            with torch.cuda.stream(stream):
                if operator.moves and lead:
                    self._delay(lead)
                    start = _recorded()
                elif operator.moves:
                    hold(compute, stream)
                operator.run(*values)
                times.append((start, _recorded()))
        late = float(go.query())
        for _, end in times:
            end.synchronize()
        return [*(start.elapsed_time(end) / 1000 for start, end in times), late]

    @cached_property
    def _delay(self) -> CopyEngine:
        """Takes no processor: a kernel would wait under compute that has taken them all, and the
        wait of the communication behind it would not be seen. A third of a long operator is one
        or two copies."""
        assert isinstance(self._lanes, CudaLanes)
        return CopyEngine(self._lanes.device, size=32 << 20)


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bits, also of what is no number, as over emulated links."""
    return torch.equal(*(value.reshape(-1).view(torch.uint8) for value in (one, other)))


def _outcome(subject: Subject) -> list[torch.Tensor]:
    """Return what an operator writes, and what it adds to gradients that are empty before.

    The gradients are as they were afterwards.
    """
    buffers = [parameter.main_grad for parameter in subject.operator.accumulates]
    before = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.zero_()
    written = list(tensors(subject.operator.run(*subject.values)))
    added = [buffer.clone() for buffer in buffers]
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    return written + added


def _note(wait: Callable[[], Any], ends: dict[int, float], index: int) -> None:
    wait()
    ends[index] = time.perf_counter()
