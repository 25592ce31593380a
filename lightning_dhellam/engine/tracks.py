"""What lanes are to the engine, and the books of those that run behind the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from lightning_dhellam.engine.tape import Ledger, Mark, Memory, Slot, tensors
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.plan import Lane, Operator, Track

COMPUTE = Track(Lane.COMPUTE)


class Lanes(ABC):
    """One device's lanes.

    Args:
        poison: overwrite floating-point memory with NaN when it is freed, to expose an operator
            that reads too late. For tests.

    Attributes:
        ledger: what is live.
        loads: whether the first launch of a kernel loads it, for which the device may have to
            finish all that it was given.
        processors: that a collective occupies, which GEMMs can leave free.
    """

    loads = False
    processors = 0

    def __init__(self, *, poison: bool = False) -> None:
        self.ledger = Ledger()
        self.poison = poison

    @abstractmethod
    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        """Start `operator` after what its inputs wait for.

        `crosses` says whether another track will read what it writes; `first`, that it shall begin
        before what `compute` is given next. Returns what the operator returned, and the mark of
        its end.
        """

    @abstractmethod
    def share(self, spare: bool) -> None:
        """Whether a GEMM that is launched next leaves processors to communication."""

    @abstractmethod
    def barrier(self) -> None:
        """Every lane waits for every other lane, but not for transfers between stages.

        Those end when another stage has come as far, which may be waiting for this one.
        """

    @abstractmethod
    def drain(self) -> None:
        """Every lane waits for everything that was issued: the step is over."""

    @abstractmethod
    def settle(self, ahead: int) -> None:
        """A walk begins: take back memory that transfers of earlier walks have read.

        Nothing waits for a send, so its tensor would be held until the step is over. What was
        issued in the walks up to the one `ahead` walks before is waited for: long done, if no stage
        lags behind.
        """

    @abstractmethod
    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        """Slots for values that are ready now, or are slots already. The ledger counts none."""

    @abstractmethod
    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        """Run the body on `lane`, after everything that `compute` was given so far."""

    def born(self, slot: Slot) -> None:
        """Note that `slot` is live."""
        self.ledger.add(slot)

    def release(self, slot: Slot) -> None:
        """Free `slot`, which has had its last reader, as soon as its memory is not in use."""
        self.ledger.remove(slot)
        self._free(slot)

    def hand_out(self, slot: Slot) -> Any:
        """The value of a slot that leaves the engine: its memory is the caller's."""
        self.ledger.remove(slot)
        return slot.value

    @abstractmethod
    def _free(self, slot: Slot) -> None:
        """Let go of the memory when no lane uses it any more."""

    def _drop(self, slot: Slot) -> None:
        if self.poison:
            for tensor in tensors(slot.value):
                if tensor.is_floating_point() and not self.ledger.shared(tensor):
                    place = tensor.untyped_storage().data_ptr()
                    with self._owned_by(slot.borrowed.get(place, slot.memory).owner):
                        tensor.fill_(torch.nan)
        slot.value = None

    def _owned_by(self, track: Track) -> AbstractContextManager[Any]:
        """Where memory of `track` may be overwritten when it is freed."""
        return nullcontext()


class TrackLanes(Lanes):
    """Lanes whose tracks run behind the host: who waits for whom, and which memory waits for that.

    The lane of transfers between stages has a track for each edge. A slot's memory belongs to
    the track that made it, as the caching allocator sees it: a view's to the track that made what
    it is a view of. When the slot has had its last reader, its memory goes back only once that
    track has waited for every other track that read it. Lanes wait for each other all the time, so
    this costs no extra synchronisation, only a little delay; what each track has seen of the others
    tells when it is so:

        compute   GEMM  ---->  writes x      next gather waits for compute: x is freed here
        tp              gather reads x -->
    """

    def __init__(self, *, poison: bool = False) -> None:
        super().__init__(poison=poison)
        self._numbers: dict[Track, int] = {}
        self._seen: dict[Track, dict[Track, int]] = {}
        self._waiting: dict[Track, list[Slot]] = {}
        self._begun: deque[dict[Track, Mark]] = deque()
        self._under_way: dict[Lane, deque[tuple[int, Mark, Mark]]] = defaultdict(deque)
        self._computed = 0
        self._open(COMPUTE)

    @abstractmethod
    def _run(self, operator: Operator, values: Sequence[Any], first: bool) -> Any:
        """Issue `operator` on its track."""

    @abstractmethod
    def _look(self, operator: Operator, inputs: Sequence[Slot]) -> Any:
        """Run an operator of values that the host looks at, once they are there."""

    @abstractmethod
    def _record(self, track: Track) -> Any:
        """What others wait for who wait for all that `track` was given so far."""

    @abstractmethod
    def _follow(self, track: Track, done: Any) -> None:
        """Have `track` wait for what `_record` has returned."""

    def _open(self, track: Track) -> None:
        self._numbers[track] = 0
        self._seen[track] = {}
        self._waiting[track] = []

    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        track = operator.track
        if track not in self._numbers:
            self._open(track)
        if operator.waits:
            # What it writes is there at once: no lane waits for it.
            return self._look(operator, inputs), Mark(track, -1, None, None)
        seen = self._seen[track]
        for slot in inputs:
            mark = slot.mark
            # Asked here as well: most slots were made on this track, or before what it waited for.
            if mark.track != track and seen.get(mark.track, -1) < mark.number:
                self._wait(track, mark)
        if track == COMPUTE:
            self._keep_up()
        result = self._run(operator, [slot.value for slot in inputs], first)
        number = self._numbers[track] = self._numbers[track] + 1
        for slot in inputs:
            for memory in slot.memories:
                if memory.owner != track:
                    memory.uses[track] = number
        copies = track.lane.copies
        mark = self._mark(track) if crosses or copies else Mark(track, number, None, None)
        if copies:
            due = self._computed + operator.ahead
            self._under_way[track.lane].append((due, mark, self._mark(COMPUTE)))
        return (result.value if isinstance(result, Pending) else result), mark

    def _keep_up(self) -> None:
        """Let compute, before its next operator, and copies wait for each other that are due."""
        for copies in self._under_way.values():
            while copies and copies[0][0] <= self._computed:
                _, copied, computed = copies.popleft()
                self._wait(COMPUTE, copied)
                self._wait(copied.track, computed)
        self._computed += 1

    def barrier(self) -> None:
        self._join([track for track in self._numbers if track.lane is not Lane.PP])

    def drain(self) -> None:
        self._join(list(self._numbers))
        self._begun.clear()
        self._under_way.clear()

    def _join(self, tracks: Sequence[Track]) -> None:
        marks = [self._mark(track) for track in tracks]
        for track in tracks:
            for mark in marks:
                self._wait(track, mark)

    def settle(self, ahead: int) -> None:
        while len(self._begun) > ahead - 1:
            self._begun.popleft()
        begun = self._begun[0] if len(self._begun) == ahead - 1 else {}
        for track, slots in self._waiting.items():
            memories = [m for slot in slots for m in slot.memories if m.owner == track]
            users = {user for memory in memories for user in memory.uses}
            for user in sorted(users & begun.keys()):
                self._wait(track, begun[user])
        self._begun.append({track: self._mark(track) for track in self._numbers})

    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        self._numbers[COMPUTE] += 1
        mark = self._mark(COMPUTE)
        return {name: slot_of(value, mark) for name, value in values.items()}

    def _mark(self, track: Track) -> Mark:
        return Mark(track, self._numbers[track], self._record(track), dict(self._seen[track]))

    def _wait(self, track: Track, mark: Mark) -> None:
        seen = self._seen[track]
        if mark.track == track or seen.get(mark.track, -1) >= mark.number:
            return
        assert mark.done is not None, "a slot crosses lanes without an event"
        self._follow(track, mark.done)
        for other, number in (mark.seen or {}).items():
            if other != track and seen.get(other, -1) < number:
                seen[other] = number
        seen[mark.track] = mark.number
        if self._waiting[track]:
            self._collect(track)

    def _collect(self, track: Track) -> None:
        slots, self._waiting[track] = self._waiting[track], []
        for slot in slots:
            self._free(slot)

    def _passed(self, memory: Memory) -> bool:
        if not memory.uses:
            return True
        seen = self._seen[memory.owner]
        return all(seen.get(track, -1) >= number for track, number in memory.uses.items())

    def _free(self, slot: Slot) -> None:
        for memory in slot.memories:
            if not self._passed(memory):
                self._waiting[memory.owner].append(slot)
                return
        self._drop(slot)


def slot_of(value: Any, mark: Mark) -> Slot:
    """The slot of a value that is ready at `mark`, or is a slot already."""
    return value if isinstance(value, Slot) else Slot(value, mark)
