"""What every rank takes, from few layers where many are alike.

Each further layer of a chunk takes as much as the one before it. So the memory of a deep model
follows from those of two shallow ones, in a second in place of half a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from lightning_dhellam.advice.lowering import are_alike, on_device, shortened
from lightning_dhellam.memory import RankMemory, Run, predict
from lightning_dhellam.search.cluster import THIN

_SIZES = [field.name for field in fields(RankMemory) if field.name not in ("stage", "ranks")]


def memory_of(run: Run) -> tuple[RankMemory, ...]:
    """Predict the memory of every rank, as `memory.predict` does.

    Raises:
        ValueError: a value that no run can have.
    """
    run = on_device(run)
    run.check()
    staged = run.topology.pp_size > 1
    split = run.layers_of_chunks() if staged else (run.config.num_layers,)
    least = min(split)
    deep = least > THIN[1] and are_alike(run.config)
    if not deep or run.build is not None or isinstance(run.recompute, Mapping):
        return predict(run)
    few, more = (predict(_with(run, split, least - depth, staged)) for depth in THIN)
    times = (least - THIN[1]) / (THIN[1] - THIN[0])
    return tuple(_further(a, b, times) for a, b in zip(few, more, strict=True))


def _with(run: Run, split: tuple[int, ...], fewer: int, staged: bool) -> Run:
    """The same run with so many layers fewer in each chunk."""
    short = tuple(count - fewer for count in split)
    config = shortened(run.config, sum(short))
    return replace(run, config=config, split=short if staged else None)


def _further(few: RankMemory, more: RankMemory, times: float) -> RankMemory:
    sizes = {}
    for name in _SIZES:
        a, b = getattr(few, name), getattr(more, name)
        sizes[name] = round(b + (b - a) * times)
    return replace(more, **sizes)
