"""A search says what gathers in 8 bits would bring, from operators measured so, and takes none."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lightning_dhellam.autosearch import AutoSearch, measuring, narrower
from lightning_dhellam.engine import Engine, MicroBatch
from lightning_dhellam.layers import narrower as options
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.plan import Lane
from lightning_dhellam.search.measure import BenchError, Profile, Samples, Target, measure
from lightning_dhellam.search.report import Offer
from tests.ranks import run_ranks
from tests.strategy.runs import GLOBAL_BATCH, Model, Sequences, join, make_trainer, train

WIDE: dict[str, Any] = {"hidden_size": 128, "ffn_hidden_size": 128, "init_std": 0.03}
EIGHT: dict[str, Any] = {"fp8": "current", "kernels": {"fp8": "reference"}, "micro_batch_size": 3}
STEPS = 16
"""As few as a search can choose in."""
KINDS: dict[str, dict[str, Any]] = {
    "fp8_all_gather": {"tensor_parallel_size": 2, **EIGHT},
    "context_fp8_keys": {"context_parallel_size": 2, "micro_batch_size": 3},
}


class Nominal:
    """Times operators by their nominal costs, whatever else this machine does."""

    lead = 0.0

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def shrinks(self, target: Target) -> bool:
        return False

    def alone(self, target: Target) -> Samples:
        return Samples((target.operator.cost * self._tokens + 1e-9,))

    def beside(self, communication: Target, other: Target) -> tuple[Samples, Samples]:
        return self.alone(communication), self.alone(other)

    behind = None


def nominal_profile(
    engine: Engine, piece: MicroBatch, made_for: Any, *, reduction: Any = None, **_: Any
) -> Profile:
    """A profile as a GPU might give it."""
    graphs = [graph for pair in engine.layers for graph in (pair.forward, pair.backward)]
    graphs += [] if reduction is None else [reduction.graph]
    return measure(Nominal(piece.tokens), graphs, made_for)  # type: ignore[arg-type]


def test_an_offer_says_what_it_brings_and_what_it_changes() -> None:
    offer = Offer(
        "fp8_all_gather=True", 0.9, 1.0, "it changes no bit", "from operators measured here"
    )
    assert str(offer) == (
        "with fp8_all_gather=True a step is predicted to take 10.0% less, from operators measured"
        " here: give it, if you will; it changes no bit"
    )
    slower = Offer("context_fp8_keys=True", 1.02, 1.0, "")
    assert str(slower) == (
        "with context_fp8_keys=True steps would be no shorter (+2.0%): leave it out"
    )


class _Runner:
    """One whose layers are the option that is on, which steps last as long as."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self.context = SimpleNamespace(world_group=None)
        self.engine = SimpleNamespace(layers="")
        self.agreed = SimpleNamespace(narrower=options, fp8="blockwise", travel=self._travel)

    def _travel(self, option: str, *, narrow: bool) -> None:
        self.engine.layers = option if narrow else ""


SECONDS = {"": 1.0, "fp8_all_gather": 0.8, "context_fp8_keys": 0.95}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is offered where so much of a step is exposed on each lane, and what was profiled."""
    solution = SimpleNamespace(builder=lambda: None)
    monkeypatch.setattr(narrower, "solve", lambda *_, **__: solution)
    monkeypatch.setattr(
        narrower, "simulate", lambda layers, *_, **__: SimpleNamespace(seconds=SECONDS[layers])
    )
    monkeypatch.setattr(narrower, "Costs", SimpleNamespace(of=lambda profile: None))

    def of(
        exposed: dict[Lane, float],
        take: Callable[[str], Any] = str,
        ending: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[list[Offer], list[str], _Runner]:
        runner, profiled = _Runner(tuple(KINDS)), list[str]()

        def profile() -> Any:
            profiled.append(runner.engine.layers)
            return take(profiled[-1])

        auto = SimpleNamespace(exposed=exposed, seconds=2.0)
        found = narrower.offers(
            runner,  # type: ignore[arg-type]
            [],
            SimpleNamespace(predicted={"auto": auto}, solution=solution),  # type: ignore[arg-type]
            (None, profile),  # type: ignore[arg-type]
            tokens=1,
            memory=narrower.Memory(None, 1.0),
            ending=ending,
        )
        return found, profiled, runner

    return of


def test_only_what_is_exposed_is_measured(offered: Any) -> None:
    assert offered({})[:2] == ([], [])
    assert offered({Lane.TP: 0.03, Lane.CP: 0.03})[:2] == ([], [])
    found, profiled, runner = offered({Lane.TP: 0.5, Lane.CP: 0.03})
    assert profiled == ["fp8_all_gather"] and runner.engine.layers == ""
    assert found == [
        Offer(
            "fp8_all_gather=True",
            0.8,
            1.0,
            "what weight gradients read is then rounded a second time",
            "from operators measured here",
        )
    ]
    found, profiled, _ = offered({Lane.TP: 0.5, Lane.CP: 0.5})
    assert profiled == [*KINDS] and [one.gain for one in found] == pytest.approx([0.2, 0.05])


@pytest.mark.parametrize("error", [BenchError("cast failed"), ValueError("does not fit")])
def test_what_cannot_be_measured_is_not_offered_and_the_run_stays_as_it_is(
    offered: Any, error: Exception
) -> None:
    def take(option: str) -> str:
        if option == "fp8_all_gather":
            raise error
        return option

    found, profiled, runner = offered({Lane.TP: 0.5, Lane.CP: 0.5}, take)
    assert [one.option for one in found] == ["context_fp8_keys=True"]
    assert profiled == [*KINDS] and runner.engine.layers == ""


def test_who_is_told_to_end_ends_in_the_middle(offered: Any) -> None:
    def take(option: str) -> str:
        raise SIGTERMException

    with pytest.raises(SIGTERMException):
        offered({Lane.TP: 0.5}, take)


@pytest.mark.parametrize("name", KINDS)
def test_exposed_gathers_are_offered_in_8_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "take_profile", nominal_profile)
    lane = "tp" if name == "fp8_all_gather" else "cp"
    link = Link(1e12, 1e-6)
    search = AutoSearch(rounds=1)
    strategy = {**KINDS[name], "plan": "auto", "emulate": Cluster(2, {lane: link})}
    if name == "context_fp8_keys":
        strategy["context_exchange"] = "all_gather"
    trainer = make_trainer(
        strategy,
        [search],
        devices=1,
        max_steps=STEPS,
        default_root_dir=tmp_path,
        precision="bf16-mixed",
    )
    trainer.fit(Model(**WIDE), DataLoader(Sequences((STEPS + 1) * GLOBAL_BATCH), GLOBAL_BATCH))
    assert search.findings is not None
    (offer,) = search.findings.offers
    # At most half of the bytes, where layers so narrow make a step of little else.
    assert offer.option == f"{name}=True" and 0.01 < offer.gain < 0.5, offer
    folder = tmp_path / "search"
    assert str(offer) in (folder / "summary.txt").read_text()
    assert f"with {name}=True a step is predicted" in (folder / "report.html").read_text()
    (row,) = json.loads((folder / "outcomes.json").read_text())["offers"]
    assert row["seconds"] == offer.seconds
    assert search.findings.metrics()[f"search/{name}/gain"] == offer.gain


def _losses(rank: int, root: Path) -> dict[str, tuple[list[float], list[float], list[str]]]:
    join(rank, 2)
    options._EXPOSED = -1.0  # measured in any case
    measuring.take_profile = nominal_profile
    found = {}
    for name, sizes in KINDS.items():
        given: dict[str, Any] = {
            "max_steps": STEPS,
            "samples": GLOBAL_BATCH * (STEPS + 1),
            "precision": "bf16-mixed",
            "default_root_dir": root / name,
        }
        plain = train(sizes, Model(**WIDE), **given)
        search = AutoSearch(rounds=1)
        searched = train({**sizes, "plan": "auto"}, Model(**WIDE), **given, callbacks=[search])
        assert search.findings is not None
        found[name] = plain, searched, [one.option for one in search.findings.offers]
    return found


def test_a_search_that_offers_changes_no_bit(tmp_path: Path) -> None:
    for found in run_ranks(2, _losses, tmp_path):
        for name, (plain, searched, offered) in found.items():
            assert offered == [f"{name}=True"]
            assert searched == plain, name
