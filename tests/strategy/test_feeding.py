"""Ranks that are fed differently: unequal numbers of batches, or other ones for a model's parts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_dhellam.parallel import Topology
from lightning_dhellam.strategy.agreed_loader import AgreedLoader, StatefulAgreedLoader
from lightning_dhellam.strategy.feeding import Feeding
from tests.ranks import run_ranks
from tests.strategy.runs import Model, Sequences, join, make_trainer


class Stream(IterableDataset[Any]):
    """Samples without a number, or with a number that is too high."""

    def __init__(self, samples: int, said: int | None = None) -> None:
        self.samples = samples
        if said is not None:
            self.__class__ = type("Said", (Stream,), {"__len__": lambda _: said})

    def __iter__(self) -> Iterator[Any]:
        data = Sequences(64)
        return (data[i] for i in range(self.samples))


class Seen(Callback):
    """How many batches each pass had, by the kind of loop."""

    def __init__(self) -> None:
        self.passes: dict[str, list[int]] = {}

    def _begin(self, name: str) -> None:
        self.passes.setdefault(name, []).append(0)

    def _count(self, name: str) -> None:
        self.passes[name][-1] += 1

    def on_train_epoch_start(self, *_: Any) -> None:
        self._begin("train")

    def on_train_batch_end(self, *_: Any) -> None:
        self._count("train")

    def on_validation_start(self, *_: Any) -> None:
        self._begin("val")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._count("val")

    def on_test_start(self, *_: Any) -> None:
        self._begin("test")

    def on_test_batch_end(self, *_: Any) -> None:
        self._count("test")

    def on_predict_start(self, *_: Any) -> None:
        self._begin("predict")

    def on_predict_batch_end(self, *_: Any) -> None:
        self._count("predict")


def _trainer(strategy: dict[str, Any], *callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    return make_trainer(strategy, callbacks, use_distributed_sampler=False, **options)


def _loops(rank: int, data: Callable[[int], Dataset[Any]]) -> tuple[dict[str, list[int]], int]:
    """Passes of all four loops, and how often it was said that numbers of batches differ."""
    seen = Seen()
    module = Model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = _trainer({}, seen)
        trainer.fit(module, DataLoader(data(rank), 2), DataLoader(data(1 - rank), 2))
        other = _trainer({}, seen)
        other.test(module, DataLoader(data(rank), 2), verbose=False)
        found = other.predict(module, DataLoader(data(1 - rank), 2)) or []
        seen.passes["predicted"] = [len(found)]
    said = sum("data-parallel ranks were given" in str(w.message) for w in caught)
    return seen.passes, said


def _dp(rank: int) -> dict[str, Any]:
    join(rank, 2)
    return {
        "known": _loops(rank, lambda r: Sequences(10 if r else 6)),
        "unknown": _loops(rank, lambda r: Stream(10 if r else 6)),
        "mistaken": _loops(rank, lambda r: Stream(10 if r else 6, said=10)),
        "half-known": _loops(rank, lambda r: Sequences(10) if r else Stream(6)),
        "none": _loops(rank, lambda r: Stream(6 * r)),
        "equal": _loops(rank, lambda r: Stream(6)),
    }


@pytest.fixture(scope="module")
def dp() -> list[dict[str, Any]]:
    return run_ranks(2, _dp)


@pytest.mark.parametrize("name", ["known", "unknown", "half-known"])
def test_all_ranks_end_each_pass_with_the_first(dp: list[dict[str, Any]], name: str) -> None:
    for rank in dp:
        passes, _ = rank[name]
        ends = {name: passes.pop(name) for name in ("predict", "predicted")}
        assert passes == {"train": [3, 3], "val": [3, 3], "test": [3]}
        # No prediction is missing, and none is there twice.
        assert ends == {"predict": [5], "predicted": [3 if rank is dp[1] else 5]}
    # Once for each loader, by the first rank.
    assert [rank[name][1] for rank in dp] == [3, 0]


def test_a_loader_that_is_mistaken_about_its_length_ends_on_all_ranks(
    dp: list[dict[str, Any]],
) -> None:
    for rank in dp:
        passes, _ = rank["mistaken"]
        # Lightning validates after the last batch of those that were said to come.
        predicted = [3 if rank is dp[1] else 5]
        expected = {"train": [3, 3], "test": [3], "predict": [5], "predicted": predicted}
        assert passes == expected


def test_a_rank_without_batches_leaves_none_to_the_others(dp: list[dict[str, Any]]) -> None:
    for rank in dp:
        passes, _ = rank["none"]
        ends = {name: passes.pop(name) for name in ("predict", "predicted")}
        assert not any(map(sum, passes.values()))
        assert ends == {"predict": [3], "predicted": [0 if rank is dp[1] else 3]}


def test_nothing_is_said_of_equal_numbers(dp: list[dict[str, Any]]) -> None:
    for rank in dp:
        passes, said = rank["equal"]
        once = {"test": [3], "predict": [3], "predicted": [3]}
        assert passes == {"train": [3, 3], "val": [3, 3], **once}
        assert said == 0


# Ranks of one model


class Shifted(Dataset[Any]):
    """Samples that are others from a certain one on."""

    def __init__(self, rank: int, first: int = 0, **sizes: int) -> None:
        self.data = Sequences(**sizes)
        self.rank, self.first = rank, first

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[(index + self.rank) % len(self) if index >= self.first else index]


TP2 = {"tensor_parallel_size": 2}
FED: dict[str, tuple[dict[str, Any], Callable[[int], Dataset[Any]], str, int]] = {
    "other-samples": (TP2, Shifted, "batches of other samples", 0),
    "other-stages": ({"pipeline_parallel_size": 2}, Shifted, "batches of other samples", 0),
    "other-lengths": (
        TP2,
        lambda rank: Sequences(length=8 + 4 * rank),
        "batches of 8 and 12 tokens per sample",
        0,
    ),
    "more-batches": (
        TP2,
        lambda rank: Sequences(16 - 8 * rank),
        "DataLoaders of 8 and 4 batches",
        0,
    ),
    "unknown-numbers": (
        TP2,
        lambda rank: Stream(8 - 2 * rank),
        "different numbers of batches, 3 on some",
        3,
    ),
    # It is compared now and then, and the answer is read at the next one.
    "later": (TP2, partial(Shifted, first=6), "batches of other samples", 5),
}


def _refusal(rank: int, name: str) -> tuple[str, int]:
    strategy, data, _, _ = FED[name]
    seen = Seen()
    try:
        _trainer(strategy, seen, max_steps=8).fit(Model(), DataLoader(data(rank), 2))
    except ValueError as error:
        return str(error), sum(seen.passes.get("train", []))
    return "no error", sum(seen.passes["train"])


def _model(rank: int) -> dict[str, Any]:
    join(rank, 2)
    found: dict[str, Any] = {name: _refusal(rank, name) for name in FED}
    seed_everything(1, workers=True)
    loader = DataLoader(Sequences(8), 2)
    _trainer(TP2, max_steps=1).fit(Model(), loader)
    found["worker"] = getattr(loader.worker_init_fn, "keywords", None)
    return found


@pytest.fixture(scope="module")
def model() -> list[dict[str, Any]]:
    return run_ranks(2, _model)


@pytest.mark.parametrize("name", FED)
def test_ranks_of_a_model_that_are_fed_differently_are_refused(
    model: list[dict[str, Any]], name: str
) -> None:
    *_, what, most_steps = FED[name]
    for rank in model:
        message, steps = rank[name]
        pattern = rf"^ranks 0 and 1 hold one model, but were given {what}: .*must read the same"
        assert re.search(pattern, message), message
        assert "Trainer.distributed_sampler_kwargs (num_replicas=1)" in message
        assert steps <= most_steps


def test_workers_of_the_ranks_of_a_model_draw_alike(model: list[dict[str, Any]]) -> None:
    assert [rank["worker"] for rank in model] == [{"rank": 0}, {"rank": 0}]


# Without processes


class Counted:
    """Counts what it has given, as a loader does whose place is saved."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[int]:
        for number in range(4):
            self.given += 1
            yield number

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def test_a_loader_whose_place_is_saved_is_not_read_ahead() -> None:
    for length in (9, None):
        loader = StatefulAgreedLoader(Counted(), length, lambda has_one, count: lambda: has_one)
        places = [(number, loader.state_dict()["given"]) for number in loader]
        # Where no length is known, a batch counts once the next one is asked for.
        assert places == [(n, n + (length is not None)) for n in range(4)]
        assert loader.state_dict() == {"given": 4}
        loader.load_state_dict({"given": 7})
        assert loader.given == 7 and loader.state_dict() == {"given": 7}


def test_other_loaders_ask_a_batch_ahead() -> None:
    said: list[Any] = []

    def ask(has_one: bool, count: int) -> Callable[[], bool]:
        said.append(count)
        return lambda: has_one

    loader = AgreedLoader(range(3), None, ask)
    assert [(batch, said[-1]) for batch in loader] == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(TypeError, match="range has no length on some rank"):
        len(loader)
    assert not hasattr(loader, "state_dict") and loader.start == 0


def test_one_rank_per_model_compares_no_contents() -> None:
    feeding = Feeding(Topology(world_size=2), None)  # type: ignore[arg-type]
    feeding.compare({"tokens": torch.zeros(1, 2)}, "train")
