"""What a stage of a pipeline does alone before it does it with the others.

A kernel that is launched for the first time is loaded, and that waits until the device has finished
all kernels that run. In a pipeline a receive that was posted early is one of them; meanwhile the
other stage, which should send, may wait in the same way for something that this one has still to
send. So every kernel of a step, and of its plan, is launched once before other stages take part,
where kernels depend on how many rows experts have by several routings that are made up.

    stage 0   loads a kernel .... waits for its receive ...........
    stage 1   loads a kernel .... waits for its receive ...........   for ever

On an H200 (2026-11-25) first launches of GEMMs, Triton's and torch's kernels waited for a kernel of
another stream, with CUDA_MODULE_LOADING=EAGER too; `cudaMalloc` and pinned allocations did not.
`cudaFree` does, which torch calls when memory runs out. See Lazy Loading, Concurrent Execution, in
the CUDA C++ Programming Guide. The ranks of one stage launch in one order, so they need no more.

Without a pipeline nothing has to be rehearsed. It may be: kernels that Triton or torch compile are
compiled when they are launched first, which takes seconds that a run's first step then does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module

from lightning_dhellam.engine.batch import MicroBatch
from lightning_dhellam.engine.executor import Executor, Observer
from lightning_dhellam.parallel.gradients import aside
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import GraphPair

Run = Callable[[list[MicroBatch]], Any]
"""Carries out some micro-batches on this stage alone."""


class Rehearsals:
    """Runs each kind of step alone before the first that other stages take part in.

    Args:
        executor: that carries them out.
        layers: of the engine.
        stage: its place in the pipeline.
        module: see `untouched`.
    """

    def __init__(
        self,
        executor: Executor,
        layers: Sequence[GraphPair],
        stage: Stage,
        module: Module | None = None,
    ) -> None:
        self._executor = executor
        self._module = module
        graphs = [graph for pair in layers for graph in (pair.forward, pair.backward)]
        operators = [operator for graph in graphs for operator in graph.operators]
        self._parameters = [p for o in operators for p in o.accumulates]
        self._turns = max((len(o.rehearsals) for o in operators), default=1) or 1
        self._stage = stage
        self._loads = executor.lanes.loads
        self._needed = stage.count > 1 and self._loads
        self._done: set[tuple[Any, ...]] = set()

    def follow(self, stage: Stage) -> None:
        """Rehearse the walks of another schedule from the next step on."""
        self._stage = stage

    def before(
        self,
        step: tuple[Any, ...],
        pieces: Sequence[MicroBatch],
        run: Run,
        *,
        wanted: bool = False,
    ) -> None:
        """Rehearse a step on `pieces` that is not known yet.

        Args:
            step: what decides on its kernels, beside the shapes: its kind and its plans.
            pieces: its micro-batches. Each shape among them is rehearsed once, by each routing that
                there is for it, by as few as walk in every way of the step, and two if there are
                two: the first adds to gradients in another way than the second.
            run: carries it out.
            wanted: whether to rehearse where no other stage has to wait as well.
        """
        if not self._is_due(wanted):
            return
        count = self._stage.fewest(len(pieces))
        for piece in pieces:
            key = (*step, self._stage.scheme, count, *_shapes(piece))
            if key not in self._done:
                for turn in range(self._turns):
                    self.once([piece] * count, run, turn=turn, wanted=wanted)
                self._done.add(key)

    def _is_due(self, wanted: bool) -> bool:
        return self._needed or (wanted and self._loads)

    def once(
        self,
        pieces: list[MicroBatch],
        run: Run,
        observer: Observer | None = None,
        turn: int = 0,
        *,
        wanted: bool = False,
    ) -> None:
        """Rehearse, whatever is known, while `observer` watches. Nothing is left of it."""
        if not self._is_due(wanted):
            return
        device = pieces[0].slots["batch.tokens"].device
        with (
            torch.no_grad(),
            untouched(self._module, device),
            self._executor.rehearsing(observer, turn),
            aside(self._parameters),
        ):
            run([piece.apart() for piece in pieces])


@contextmanager
def untouched(module: Module | None, device: torch.device) -> Iterator[None]:
    """Give back the random numbers of `device`, and the buffers of `module`, as they were.

    A user's block or loss may have changed them. What else it has changed stays.
    """
    owners = list(module.modules()) if module is not None else []
    kept = [
        (owner, name, buffer, buffer.clone())
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for owner, name, buffer, value in kept:
                owner._buffers[name] = buffer
                # Autograd may have kept it, and would call it modified.
                buffer.data.copy_(value)


def _shapes(piece: MicroBatch) -> tuple[Any, ...]:
    """The shapes of the tokens, whether documents are packed, and what a user's loss may read."""
    data = piece.slots.get("batch.data") or {}
    shapes = ((name, tuple(value.shape)) for name, value in data.items() if torch.is_tensor(value))
    packed = piece.slots.get("batch.documents") is not None
    return (tuple(piece.slots["batch.tokens"].shape), packed, *shapes)
