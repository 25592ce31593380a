"""Whether a run fits, and what would make it fit: tried by the same prediction, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_dhellam.memory.prediction import RankMemory, Run, predict
from lightning_dhellam.parallel.topology import Topology

MARGIN = 0.05
"""How much less than predicted a run may take, of what is refused all the same. Slack counts for
nothing there, so that no run that would fit is stopped by what is assumed."""
Predict = Callable[[Run], Sequence[RankMemory]]


def limit_of(device: torch.device, given: int | None) -> int | None:
    """Bytes that a run may take of its device: as given, or all of a GPU's; None on a CPU else."""
    if given is None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return given


def cannot_fit(tensors: int, limit: int) -> bool:
    """Whether a rank with so many bytes of tensors is beyond a limit, whatever the slack."""
    return tensors * (1 - MARGIN) > limit


def cheapest_change(run: Run, limit: int, predicted: Predict = predict) -> str | None:
    """The first of `changes` with which all ranks fit, slack included, as a user would write it.

    Returns None where none does.

    Args:
        run: that does not fit.
        limit: bytes that a rank may take.
        predicted: predicts the memory of a run.
    """
    for text, other in changes(run):
        try:
            other.check()
            found = predicted(other)
        except ValueError:  # no such run
            continue
        if all(rank.total <= limit for rank in found):
            return text
    return None


def changes(run: Run) -> Iterator[tuple[str, Run]]:
    """Give runs of the same model on as many ranks that take less, by what they cost in time.

    First what costs hardly anything, then what computes again, and then what communicates more;
    the last of each is tried with all of a layer made again as well.
    """
    lighter = run
    if run.recompute in ("none", "gathers"):
        lighter = replace(lighter, recompute="selective")
        yield "recompute='selective'", lighter
    if run.distributed_optimizer is False and run.topology.replicas > 1:
        lighter = replace(lighter, distributed_optimizer=True)
        yield _texts(run, lighter), lighter
    size = run.micro_batch_size
    while size > 1:
        size //= 2
        smaller = replace(lighter, micro_batch_size=size)
        yield _texts(run, smaller), smaller
    full = replace(lighter, recompute="full", micro_batch_size=1)
    if full != lighter:
        yield _texts(run, full), full
    for base in (lighter, full):
        for name in ("tp_size", "pp_size", "cp_size"):
            size = 2 * getattr(run.topology, name)
            while run.topology.world_size % size == 0:
                topology = _with(run.topology, name, size)
                if topology is not None:
                    wider = replace(base, topology=topology, split=None)
                    yield _texts(run, wider), wider
                size *= 2


def _with(topology: Topology, name: str, size: int) -> Topology | None:
    """The same ranks with another parallel size; experts are shared as layers are, if they were."""
    of_layers = topology.etp_size == topology.tp_size
    sizes: dict[str, Any] = {name: size}
    if name == "tp_size" and of_layers:
        sizes["etp_size"] = size
    try:
        return replace(topology, rank=0, **sizes)
    except ValueError:
        return None


def _texts(run: Run, other: Run) -> str:
    """What is changed, as arguments of the strategy."""
    texts = [
        f"{name}={getattr(other, name)!r}"
        for name in ("recompute", "distributed_optimizer", "micro_batch_size")
        if getattr(other, name) != getattr(run, name)
    ]
    texts += [
        f"{spelt}={getattr(other.topology, name)}"
        for name, spelt in Topology.SPELLING.items()
        if getattr(other.topology, name) != getattr(run.topology, name)
    ]
    return ", ".join(texts)


def refusal(stage: int, tensors: int, limit: int, whence: str, change: str | None) -> str:
    """Say in a line that a run cannot fit, and what would.

    Args:
        stage: where most is taken.
        tensors: bytes that a rank of it would take.
        limit: bytes that it may.
        whence: where the limit comes from.
        change: see `cheapest_change`.
    """
    remedy = (
        f"{change} would fit"
        if change
        else "no smaller micro-batch, recomputation or parallel size on as many ranks would fit:"
        " use more ranks, or a smaller model"
    )
    return (
        f"this run would take {_shown(tensors)} on a rank of stage {stage}, and"
        f" {whence} leaves {_shown(limit)}: {remedy}; a larger memory_limit= tries it all"
        " the same"
    )


def _shown(size: int) -> str:
    unit, bytes_of_unit = ("GiB", 2**30) if size >= 2**29 else ("MiB", 2**20)
    return f"{size / bytes_of_unit:.3g} {unit}"
