"""Predictions say what gathers in 8 bits would bring where they are exposed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_dhellam.advice import Conditions, offers, predict
from lightning_dhellam.memory import Run
from lightning_dhellam.models import preset
from lightning_dhellam.parallel import Topology
from lightning_dhellam.plan import Lane
from tests.advice.test_predict import H200

CONDITIONS = Conditions(H200, slower={Lane.TP: 4.0, Lane.CP: 8.0})
"""Networks so slow that what crosses them is exposed."""


def wide(plan: str = "sequential", **fields: object) -> Run:
    """Four layers, of which two ranks share each, by the names of their sizes."""
    sizes = {n: fields.pop(n) for n in ("tp_size", "cp_size", "pp_size") if n in fields}
    config = preset("llama-3-8b", num_layers=4, vocab_size=32000)
    world = 2 * int(fields.pop("stages", 1))  # type: ignore[call-overload]
    topology = Topology(world_size=world, **sizes)  # type: ignore[arg-type]
    return Run(config, topology, 2, 8192, plan=plan, **fields)  # type: ignore[arg-type]


CASES = {
    "current": ("fp8_all_gather", wide(tp_size=2, fp8="current"), "; it changes no bit"),
    "blockwise": (
        "fp8_all_gather",
        wide(tp_size=2, fp8="blockwise"),
        "; what weight gradients read is then rounded a second time",
    ),
    "keys": (
        "context_fp8_keys",
        wide(cp_size=2),
        "; keys and values of other ranks are then rounded, by at most 1/16",
    ),
    "stages": (
        "fp8_all_gather",
        wide("auto", tp_size=2, pp_size=2, stages=2, fp8="current", schedule="auto"),
        "; it changes no bit",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_prediction_offers_what_another_one_keeps(case: str) -> None:
    name, run, changes = CASES[case]
    found = predict(replace(run, schedule=run.begun), CONDITIONS)
    (offer,) = offers(run, CONDITIONS, found)
    assert offer.option == f"{name}=True" and str(offer).endswith(changes)
    assert 0.01 < offer.gain < found.lanes["cp" if case == "keys" else "tp"].busy / found.seconds
    assert found.notes[-1] == str(offer)
    other = predict(replace(run, schedule=run.begun, **{name: True}), CONDITIONS)  # type: ignore[arg-type]
    assert other.seconds / found.seconds == pytest.approx(1 - offer.gain, abs=0.02)
    assert not any("=True a step" in note for note in other.notes), "it has it"


def test_nothing_is_offered_where_nothing_is_exposed_or_could_travel_so() -> None:
    quick = Conditions(H200, slower={Lane.TP: 0.1})
    for run, conditions in (
        (wide("interleaved", tp_size=2, fp8="current"), quick),
        (wide(tp_size=2), CONDITIONS),  # linear layers in 16 bits
        (wide(fp8="current"), CONDITIONS),  # one rank
    ):
        found = predict(run, conditions)
        assert [*offers(run, conditions, found)] == []
