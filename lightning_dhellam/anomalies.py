"""Says of a step whose loss or gradient is not finite which operator was the first to make it so.

Each rank looks at what its own operators have made. What is not finite travels from rank to rank,
and where it comes from is where no rank has sent it:

    rank 0   gemm  scatter: not finite           rank 1   gemm: not finite  scatter
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.agreed import AgreedEngine
from lightning_dhellam.engine.anomalies import Anomaly, Watch
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer

WARN = "warn"
"""The choice by which a run goes on."""


def check_anomalies(detect_anomaly: bool | str) -> None:
    """Refuse what is no choice.

    Raises:
        ValueError: with those that there are.
    """
    if not isinstance(detect_anomaly, bool) and detect_anomaly != WARN:
        raise ValueError(f"detect_anomaly={detect_anomaly!r} must be true, false or '{WARN}'")


class _Found(NamedTuple):
    """What one rank knows of a step.

    Attributes:
        anomaly: what its operators made first, or None.
        weights: names of a parameter that is not finite itself, none or one.
        gradients: of a parameter whose gradient is not, by the time that it is stepped on.
    """

    anomaly: Anomaly | None
    weights: list[str]
    gradients: list[str]


class Anomalies:
    """Watches the steps of a run.

    Args:
        agreed: computes the gradients.
        names: of this rank's parameters.
        optimizer: that steps on them.
        ends: whether such a step ends the run, if no smaller scale of the loss can mend it; it is
            left out in any case.
    """

    def __init__(
        self,
        agreed: AgreedEngine,
        names: Mapping[Tensor, str],
        optimizer: ModelParallelOptimizer,
        *,
        ends: bool,
    ) -> None:
        self._agreed = agreed
        self._names = names
        self._optimizer = optimizer
        self._ends = ends
        self._watch: Watch | None = None
        optimizer.watchers.append(self.judge)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what the operators of the step inside make."""
        engine = self._agreed.engine
        watch = self._watch = Watch(engine.layers, self._agreed.places, self._names)
        # Autograd, which runs a loss of the user's own, would raise on this rank alone.
        with engine.wrapped(watch.watched), torch.autograd.set_detect_anomaly(False):
            yield

    def judge(self, finite: Tensor) -> None:
        """Say what made the step so, unless `finite`. All ranks must call this; the host waits.

        Raises:
            FloatingPointError: on all ranks, if it is to end the run.
        """
        watch, self._watch = self._watch, None
        if bool(finite):
            return
        anomaly = watch.first() if watch is not None else None
        weights = [name for p, name in self._names.items() if not bool(p.isfinite().all())]
        found = _Found(anomaly, weights[:1], self._optimizer.infinite_gradients()[:1])
        every = of_all_ranks(found, self._agreed.context.world_group)
        rank, first = _origin(every)
        text = (
            f"the loss or the gradient of step {self._optimizer.steps} is not finite:"
            f" {_cause(rank, every[rank], first)}"
        )
        if self._ends and not self._may_be_scale(first):
            raise FloatingPointError(
                f"{text}; detect_anomaly='{WARN}' leaves such a step out and goes on"
            )
        if self._agreed.context.topology.rank == 0:
            warnings.warn(text, stacklevel=2)

    def _may_be_scale(self, first: Anomaly | None) -> bool:
        """Whether a smaller scale of the loss may mend it: gradients alone are scaled."""
        scale = self._optimizer.loss_scale
        in_forward = first is not None and not first.operator.startswith("backward/")
        return scale is not None and not in_forward and bool(scale.value >= 1)


def _origin(every: list[_Found]) -> tuple[int, Anomaly | None]:
    """The rank where it began and what began it there, where operators began it."""
    ranked = [(rank, found.anomaly) for rank, found in enumerate(every) if found.anomaly]
    if ranked:
        # What was sent comes last; it is the origin where a sum over ranks was too large.
        return min(ranked, key=lambda one: (one[1].received, one[1].micro_batch or 0, one[1].place))
    return next((rank for rank, found in enumerate(every) if found.gradients), 0), None


def _cause(rank: int, found: _Found, first: Anomaly | None) -> str:
    weights = "".join(f", where parameter '{name}' is not finite itself" for name in found.weights)
    if first is not None:
        return f"{first} on rank {rank} made it first, in '{first.result}'{weights}"
    for name in found.gradients:
        return (
            f"its operators have made nothing such; the gradient of '{name}' became so on rank"
            f" {rank} between them and the optimizer, in a hook or in the reduction over ranks"
        )
    return f"its operators have made nothing such{weights}"
