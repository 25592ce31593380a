"""The global order of samples: who gets which, and what happens in the middle of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dhellam.data.loader import ResumableDataLoader, SampleOrder

DATA = TensorDataset(torch.arange(100))


def order(batch_size: int, replicas: int = 1, rank: int = 0, **options: Any) -> SampleOrder:
    return SampleOrder(DATA, batch_size, seed=5, replicas=replicas, rank=rank, **options)


def drawn(batch_size: int, replicas: int, start: int, epochs: int = 1) -> list[int]:
    """What all ranks together see of some epochs, step by step, from a place in the order."""
    found: list[int] = []
    orders = [order(batch_size, replicas, rank) for rank in range(replicas)]
    loaders = [ResumableDataLoader[Any](DATA, sampler) for sampler in orders]
    for loader in loaders:
        loader.load_state_dict({"samples": start})
    for _ in range(epochs):
        for batches in zip(*loaders, strict=True):
            shares = [values.tolist() for (values,) in batches]
            found += [sample for turn in zip(*shares, strict=True) for sample in turn]
    return found


@pytest.mark.parametrize(("batch_size", "replicas"), [(4, 1), (8, 1), (2, 1), (3, 1), (2, 3)])
def test_any_batch_size_and_any_ranks_go_on_with_the_next_sample(
    batch_size: int, replicas: int
) -> None:
    straight = drawn(4, 1, 0, epochs=3)
    assert straight[:100] == list(range(100))
    resumed = drawn(batch_size, replicas, 24)
    assert resumed == straight[24 : 24 + len(resumed)]
    assert len(resumed) == 100 // (batch_size * replicas) * batch_size * replicas


def test_an_epoch_ends_where_the_next_one_begins() -> None:
    """Also where whole batches do not make up a pass."""
    found = drawn(7, 2, 0, epochs=4)
    passes = [sorted(found[start : start + 100]) for start in (0, 100, 200)]
    assert passes == [list(range(100))] * 3


def test_orders_of_other_seeds_and_passes_differ() -> None:
    one, other = order(1), SampleOrder(DATA, 1, seed=6)
    second, third = ([one.sample(100 * turn + i) for i in range(100)] for turn in (1, 2))
    assert second != third and sorted(second) == sorted(third)
    assert second != [other.sample(100 + i) for i in range(100)]
    # Whatever was asked for before.
    assert [one.sample(100 + i) for i in range(100)] == second


@pytest.mark.parametrize("workers", [0, 2])
def test_only_what_was_handed_out_counts(workers: int) -> None:
    loader = ResumableDataLoader[Any](DATA, order(10), num_workers=workers)
    iterator = iter(loader)
    assert loader.state_dict() == {"samples": 0}
    next(iterator), next(iterator)
    assert loader.state_dict() == {"samples": 20}
    other = ResumableDataLoader[Any](DATA, order(5), num_workers=workers)
    other.load_state_dict(loader.state_dict())
    assert next(iter(other))[0].tolist() == [20, 21, 22, 23, 24]


def test_a_state_of_version_0_1_counts_batches() -> None:
    loader = ResumableDataLoader[Any](DATA, order(4, replicas=2))
    loader.load_state_dict({"batches": 3})
    assert loader.state_dict() == {"samples": 24}


def test_with_another_sampler_it_is_an_ordinary_loader() -> None:
    loader = ResumableDataLoader[Any](DATA, batch_size=60)
    assert [len(values) for (values,) in loader] == [60, 40]
    assert loader.state_dict() == {}
