"""What ranks say to each other about the batches they are fed.

Ranks of one model, whether they share layers, sequences or stages, must be given the same batches,
and data-parallel ranks as many batches as each other. A loader need not do so: one that shards by
the global rank, or an augmentation that draws by it, feeds a model halves that do not belong
together, and nothing but the loss is wrong.

So ranks compare, in host memory: how many batches there are; what is in the first one of each
loader, before it is computed on; and from then on what is in some of them, of which the answer is
read at the next batch, so that no step waits for it.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import has_iterable_dataset, sized_len
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_dhellam.engine.documents import KEYS
from lightning_dhellam.parallel import Topology
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.hosts import Question, ReduceOp
from lightning_dhellam.strategy.agreed_loader import (
    AgreedLoader,
    Ask,
    RepeatingLoader,
    StatefulAgreedLoader,
    keeps_place,
)

_READ = ("tokens", "labels", "loss_mask", *KEYS)
_EVERY = 64
"""Batches after which one is compared again; early ones are compared more often."""


class Feeding:
    """Compares what the ranks of a run are fed.

    Args:
        topology: of the run.
        group: of all ranks, for tensors in host memory.
    """

    def __init__(self, topology: Topology, group: dist.ProcessGroup) -> None:
        self._topology = topology
        self._group = group
        self._model_size = topology.world_size // topology.dp_size
        self._seen: Counter[Hashable] = Counter()
        self._asked: Question | None = None
        self._have: list[float] = []

    def loader(self, loader: Any) -> Any:
        """The loader, or one that ends on all ranks together. Every rank must call this.

        Raises:
            ValueError: ranks of one model have different numbers of batches.
        """
        lengths, trusted = self._lengths(loader)
        for model in range(self._topology.dp_size):
            own = [lengths[rank] for rank in self._ranks(model)]
            if len(set(own)) > 1:
                self._refuse(model, f"DataLoaders of {_spell(own)} batches")
        differ = len(set(lengths)) > 1
        if trusted and not differ:
            return loader
        if trusted:
            self._warn(f"DataLoaders of {_spell(lengths)} batches", f"after {min(lengths)}")
        length = None if None in lengths else min(lengths)
        ask: Ask | None = None if trusted else self._asker()
        if keeps_place(loader):
            return StatefulAgreedLoader(loader, length, ask)
        return AgreedLoader(loader, length, ask)

    def repeating(self, loader: Any) -> Any:
        """The loader, or one that goes on until those of all ranks have ended.

        For predictions, of which none may be missing. Every rank must call this.
        """
        lengths, trusted = self._lengths(loader)
        if trusted and len(set(lengths)) == 1:
            return loader
        length = None if None in lengths else max(lengths)
        return RepeatingLoader(loader, length, self._asker(any), self._first)

    def _lengths(self, loader: Any) -> tuple[list[Any], bool]:
        """How many batches each rank's loader says it has, and whether all can be believed."""
        self._seed_workers(loader)
        found = of_all_ranks((sized_len(loader), has_iterable_dataset(loader)), self._group)
        # How many an IterableDataset really has depends on its workers.
        trusted = not any(length is None or iterable for length, iterable in found)
        return [length for length, _ in found], trusted

    def _first(self, batch: Any) -> Any:
        """This rank's batch, or else that of another."""
        if all(self._have):
            return batch
        found = of_all_ranks(batch, self._group)
        return next(each for each in (batch, *found) if each is not None)

    def compare(self, batch: Any, loader: Hashable) -> None:
        """Compare the batches of a loader, now and then. Every rank must call this for each.

        Raises:
            ValueError: on every rank: those of a model have different batches, or had some before.
        """
        if self._model_size == 1:
            return
        self._read()
        number = self._seen[loader]
        self._seen[loader] += 1
        if number & (number - 1) and number % _EVERY:
            return
        # The largest, and by the other sign the smallest, of each model's ranks.
        values = _facts(batch)
        mine = [*values, *(-value for value in values)]
        numbers = [-inf] * (len(mine) * self._topology.dp_size)
        start = len(mine) * self._topology.dp_rank
        numbers[start : start + len(mine)] = mine
        self._asked = Question(numbers, self._group)
        if number == 0:
            self._read()

    def _asker(self, goes_on: Callable[[Sequence[float]], bool] = all) -> Ask:
        """Asks before each batch of a loader whether it is there, on all ranks or on any.

        Where they end with the first it is said once that they had not equally many.
        """
        has_warned = False

        def judge(question: Question, count: int) -> bool:
            nonlocal has_warned
            have = self._have = list(question.answer())
            for model, ranks in enumerate(have):
                if 0 < ranks < self._model_size:
                    self._refuse(model, f"different numbers of batches, {count} on some")
            if goes_on is all and any(have) and not all(have) and not has_warned:
                has_warned = True
                self._warn("different numbers of batches", f"after {count}")
            return goes_on(have)

        def ask(has_one: bool, count: int) -> Callable[[], bool]:
            have = [0.0] * self._topology.dp_size
            have[self._topology.dp_rank] = float(has_one)
            return partial(judge, Question(have, self._group, ReduceOp.SUM), count)

        return ask

    def _read(self) -> None:
        if self._asked is None:
            return
        numbers, self._asked = list(self._asked.answer()), None
        size = len(numbers) // self._topology.dp_size
        for model in range(self._topology.dp_size):
            part = numbers[model * size : (model + 1) * size]
            most, least = part[: size // 2], [-value for value in part[size // 2 :]]
            for name, high, low in zip(_FACTS, most, least, strict=True):
                if high != low:
                    what = f"of {low:.0f} and {high:.0f} {name}" if name else "of other samples"
                    self._refuse(model, f"batches {what}")

    def _ranks(self, model: int) -> list[int]:
        """The ranks that hold a model, which is numbered as data-parallel ranks are."""
        ranks = range(self._topology.world_size)
        return [rank for rank in ranks if replace(self._topology, rank=rank).dp_rank == model]

    def _refuse(self, model: int, what: str) -> None:
        raise ValueError(
            f"ranks {_spell(self._ranks(model))} hold one model, but were given {what}: all ranks"
            " of a model must read the same samples. Deal samples by"
            " Trainer.distributed_sampler_kwargs"
            f" (num_replicas={self._topology.dp_size}), not by the global rank, and draw what is"
            " random from a seed that they share"
        )

    def _warn(self, what: str, when: str) -> None:
        rank_zero_warn(
            f"data-parallel ranks were given {what}: each pass over them ends on all ranks {when},"
            " with the rank that has the fewest"
        )

    def _seed_workers(self, loader: Any) -> None:
        """Seed workers as Lightning does, but alike on the ranks of a model."""
        wanted = bool(int(os.environ.get("PL_SEED_WORKERS", 0)))
        if wanted and getattr(loader, "worker_init_fn", loader) is None:
            loader.worker_init_fn = partial(pl_worker_init_function, rank=self._topology.dp_rank)


_FACTS = ("samples", "tokens per sample", "")


def _facts(batch: Any) -> list[float]:
    """What must be alike on all ranks of a model: see `_FACTS`, the last one of which is a digest.

    Contents on a device are not looked at, since looking would wait.
    """
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return [0.0, 0.0, 0.0]  # is refused elsewhere
    return [*map(float, tokens.shape), float(digest(batch))]


def digest(batch: Mapping[str, Any]) -> int:
    """32 bits of what the engine reads of a batch."""
    found = 0
    for name in _READ:
        value = batch.get(name)
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel():
            found = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data, found)
    return found


def _spell(values: Sequence[Any]) -> str:
    """Values in a row, each once."""
    shown = [*dict.fromkeys("an unknown number of" if v is None else str(v) for v in values)]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
