"""Several data sets as one: shares up to any place, passes, resuming, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from lightning_dhellam.data.blend import BlendedOrder, check_weights
from lightning_dhellam.data.loader import SampleOrder
from lightning_dhellam.data.module import IndexedDataModule
from lightning_dhellam.data.prepare import prepare
from lightning_dhellam.data.prepared import PreparedData

Write = Callable[[str, int, int], str]
WEIGHTS = [0.5, 0.3, 0.2]
SETS = [range(7), range(40), range(11)]


def _order(batch_size: int = 1, **options: Any) -> BlendedOrder:
    return BlendedOrder(SETS, WEIGHTS, batch_size, 5, **options)


def _split_up(places: Sequence[int]) -> list[list[int]]:
    """The samples of each set, in the order in which they came."""
    ends = numpy.cumsum([len(one) for one in SETS])
    found: list[list[int]] = [[] for _ in SETS]
    for place in places:
        which = int(numpy.searchsorted(ends, place, side="right"))
        found[which].append(place - int(ends[which]) + len(SETS[which]))
    return found


def test_every_set_has_its_share_up_to_any_place() -> None:
    order = _order()
    places = [order.sample(number) for number in range(10_000)]
    for count in (1, 2, 3, 10, 77, 5000, 10_000):
        shares = [len(one) / count for one in _split_up(places[:count])]
        assert all(abs(s - w) * count <= 1 for s, w in zip(shares, WEIGHTS, strict=True)), count


def test_a_set_goes_on_by_passes_as_it_would_alone() -> None:
    order = _order()
    of_sets = _split_up([order.sample(number) for number in range(300)])
    for samples, found in zip(SETS, of_sets, strict=True):
        alone = SampleOrder(samples, 1, 5)
        assert found == [alone.sample(number) for number in range(len(found))]
        assert sorted(found[: len(samples)]) == list(samples)
    assert order.passes(300) == [
        len(found) / len(samples) for found, samples in zip(of_sets, SETS, strict=True)
    ]


def test_what_is_at_a_place_depends_on_nothing_else() -> None:
    expected = [_order().sample(number) for number in range(9000)]
    late = _order()
    assert [late.sample(number) for number in (8999, 5000, 0)] == [
        expected[number] for number in (8999, 5000, 0)
    ]
    dealt = [list(_order(2, replicas=2, rank=rank, epoch_samples=24)) for rank in (0, 1)]
    assert [one for pair in zip(*dealt, strict=True) for one in pair] == expected[:24]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes so many documents of 10 tokens that begin at an id, as Megatron-LM does."""

    def one(name: str, documents: int, first: int) -> str:
        prefix = tmp_path / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
        for number in range(documents):
            builder.add_document(numpy.arange(10) + first + number % 40 * 10, [10])
        builder.finalize(f"{prefix}.idx")
        return str(prefix)

    return one


def _module(path: Any, tmp_path: Path, **options: Any) -> IndexedDataModule:
    given: dict[str, Any] = {"vocab_size": 1000, "num_workers": 0, "split": "8,2,0", **options}
    return IndexedDataModule(path, 9, 4, cache_dir=tmp_path / "cache", **given)


def _firsts(data: IndexedDataModule, batches: int) -> list[list[int]]:
    loader = iter(data.train_dataloader())
    return [batch["tokens"][:, 0].tolist() for batch in islice(loader, batches)]


def test_the_data_module_blends_resumes_and_says_so(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = {write("small", 12, 0): 3, write("large", 100, 500): 1}
    data = _module(path, tmp_path, train_samples=80)
    with caplog.at_level("INFO"):
        batches = _firsts(data, 20)
    of_small = sum(token < 500 for batch in batches for token in batch)
    assert of_small == 60
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert re.search(r"80 training samples has of \S+small 75.0% \(\d+ samples, [5-9]\.\d\d", said)
    first = _module(path, tmp_path, train_samples=80)
    loader = iter(first.train_dataloader())
    for _ in range(7):
        next(loader)
    state = first.state_dict()
    again = _module(path, tmp_path, train_samples=80)
    again.load_state_dict(state)
    assert _firsts(again, 13) == batches[7:]
    validation = again.val_dataloader()
    assert sum(len(batch["tokens"]) for batch in validation) == len(validation.dataset)  # type: ignore[union-attr, arg-type]
    other = _module({**path, next(iter(path)): 2}, tmp_path)
    with pytest.raises(ValueError, match=r"trained on data with path=.*, this run has path="):
        other.load_state_dict(state)


def test_one_set_in_a_mapping_is_that_set(write: Write, tmp_path: Path) -> None:
    path = write("one", 40, 0)
    alone = _module(path, tmp_path)
    assert _firsts(_module({path: 7.0}, tmp_path), 5) == _firsts(alone, 5)
    assert alone.state_dict()["order"] == _module({path: 2}, tmp_path).state_dict()["order"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"path=\{\} has no data set"),
        ({"a": 1.0, "b": -0.5}, r"path=\{b: -0.5\}: the weight of a data set is a number above 0"),
        ({"a": 0.0}, r"path=\{a: 0.0\}"),
        ({"a": float("nan")}, r"path=\{a: nan\}"),
        ({"a": float("inf")}, r"path=\{a: inf\}"),
    ],
)
def test_weights_that_are_none_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights(weights)


def test_weights_are_normalised() -> None:
    assert check_weights({"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25}


def test_a_list_of_paths_and_different_tokenizers_are_refused(
    write: Write, tmp_path: Path, prepared: PreparedData
) -> None:
    path = write("one", 40, 0)
    with pytest.raises(ValueError, match="path="):
        _module([path, path], tmp_path)
    other = tmp_path / "other"
    prepare([prepared.source], other, vocab_size=310, workers=1)
    mixed: dict[str, float] = {str(other): 1.0, str(prepared.path): 1.0}
    with pytest.raises(ValueError, match="which were made with different tokenizers"):
        _module(mixed, tmp_path, vocab_size=None)


def test_the_configuration_of_a_command_may_name_a_blend() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(IndexedDataModule, "data")
    sizes = ["--data.sequence_length", "8", "--data.batch_size", "2"]
    blend = parser.parse_args(['--data.path={"a": 3, "b": 0.5}', *sizes]).data.path
    assert blend == {"a": 3, "b": 0.5}
    assert parser.parse_args(["--data.path=data/a", *sizes]).data.path == "data/a"
