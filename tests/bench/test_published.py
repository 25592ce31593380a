"""`dhellam bench published`: what was published, predicted in the same settings without a GPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dhellam.bench.command import bench_command
from lightning_dhellam.bench.published.cases import CASES, Case
from lightning_dhellam.bench.published.report import APART, ASSUMED, SPENT, explained
from lightning_dhellam.bench.published.run import SIDES, predictions
from lightning_dhellam.models import parameter_count, preset
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.search.cluster import Prediction

TABLES = Path(__file__).parents[2] / "benchmarks/simulated"
SMALL = Case(
    "small",
    preset("llama-3.2-1b", num_layers=6),
    "a40-64",
    4,
    {"tp_size": 4},
    2048,
    1,
    8,
    1.1,
    50.0,
    "all",
)


@pytest.fixture(scope="module")
def small() -> dict[str, Prediction]:
    return predictions(SMALL, None, 20)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_published_setting_is_a_run_that_the_cluster_can_have(case: Case) -> None:
    """As large a model as its name says, on as many GPUs as the parallel sizes take."""
    run = case.run("megatron", "1f1b")
    run.check()
    assert Cluster.load(case.cluster).world_size >= run.topology.world_size == case.gpus
    billions = next(float(w[:-1]) for w in re.split("[ ,]+", case.name) if w[-1:] == "B")
    assert parameter_count(case.config) / 1e9 == pytest.approx(billions, rel=0.03)
    assert run.samples % run.micro_batch_size == 0
    assert case.config.max_sequence_length >= case.length


def test_the_gain_of_each_side_is_told_by_what_its_step_is_spent_on(
    small: dict[str, Prediction],
) -> None:
    assert {*small} == {*SIDES}
    assert [step.choice.schedule for step in small.values()] == [*SIDES.values()]
    assert small["auto"].seconds <= min(small[plan].seconds for plan in ("dhellam", "pairs"))
    assert small["megatron"].seconds <= small["sequential"].seconds
    base, step = small["megatron"], small["pairs"]
    gain = base.seconds / step.seconds
    assert gain > 1
    known = replace(SMALL, gain=gain)
    assert explained(known, base, step).startswith("as published: of megatron's step ")
    above = explained(replace(SMALL, gain=1.001), base, step)
    assert "their baseline exposed less" in above and "than their bar" in above
    # More than there is to hide; and less than that, but more than is hidden.
    assert "their baseline exposed more" in explained(replace(SMALL, gain=99.0), base, step)
    exposed = base.stages[0].exposed / base.seconds
    between = 1 / (1 - (exposed + max(1 - 1 / gain, exposed)) / 2 + 1e-4)
    if between > 1.03 * gain:
        assert "barriers between pairs leave" in explained(
            replace(SMALL, gain=between, rate=None), base, step
        )


def test_the_command_writes_gains_assumptions_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "H200 Qwen 14.8B, 8 GPUs"
    words = [f"--cases=['{name}']", "--evaluations=10", f"--output={tmp_path}"]
    assert bench_command(["published", *words]) == 0
    assert "upper bounds" in capsys.readouterr().out
    (file,) = tmp_path.glob("published-predicted-*.json")
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert row["published"] == pytest.approx(0.47 / 0.41)
    assert row["from"] < row["megatron s"] < row["to"] and row["sequential"] < 1 < row["auto"]
    (assumed,) = found[ASSUMED]
    assert (
        assumed["tp"] == 8
        and assumed["inside GB/s"] == 370
        and "note's layer" in assumed["assumed"]
    )
    parts = ("compute", "exposed", "transfer", "bubble", "reduction", "optimizer")
    for spent in found[SPENT]:
        assert sum(spent[part] for part in parts) == pytest.approx(100)
        assert spent["exposed"] == pytest.approx(spent["exposed tp"]), "it has no other lane"
    assert "of megatron's step" in found[APART][0]["why"]


def test_the_table_that_is_kept_has_all_of_them() -> None:
    newest = max(TABLES.glob("published-predicted-*.json"))
    rows = json.loads(newest.read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    assert [row["published"] for row in rows] == [case.gain for case in CASES]


def test_an_unknown_bar_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'A40 Llama 7B' is no published bar: use A40 Llama 8B"):
        bench_command(["published", "--cases=['A40 Llama 7B']"])
    with pytest.raises(ValueError, match="--evaluations 0 must be at least 1"):
        bench_command(["published", "--evaluations=0"])
