"""`dhellam bench published`: what was published, predicted in the same settings without a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_dhellam.bench.command import bench_command
from lightning_dhellam.bench.published.cases import CASES, Case
from lightning_dhellam.bench.published.report import (
    APART,
    ASSUMED,
    COLUMNS,
    SPENT,
    add,
    explained,
    reasons,
)
from lightning_dhellam.bench.published.run import SIDES, predictions
from lightning_dhellam.bench.report import Report
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
    report = Report("published", "predicted", COLUMNS)
    add(report, SMALL, small)
    (row,), spent = report.rows, report.details[SPENT]
    assert row["pairs"] > 1
    (own,) = reasons([row | {"published": row["pairs"]}], spent)
    assert own["why"].startswith("as published: of megatron's step ")


def _step(exposed: float, tp: float = 0.0, cp: float = 0.0) -> dict[str, float]:
    rest = {"transfer": 0.0, "bubble": 0.0, "reduction": 6.0, "optimizer": 4.0}
    lanes = {"exposed tp": tp, "exposed cp": cp, "exposed ep": 0.0}
    return {"compute": 90 - exposed, "exposed": exposed, **rest, **lanes}


def _why(published: float, rate: float | None) -> str:
    """Of a step of which 40% are exposed, 22% with pairs and 4% in any order."""
    spent = {"megatron": _step(40, 33, 11), "pairs": _step(25), "auto": _step(5)}
    row = {"published": published, "pairs": 1 / 0.88, "auto": 1 / 0.8}
    return explained(row | {"published TFLOP/s": rate, "megatron TFLOP/s": 60.0}, spent)


def test_a_reason_says_no_more_than_the_steps_do() -> None:
    """What no order hides is not the barriers', and what was published is not guessed at."""
    why = _why(1.3, 50.0)
    assert "40% is exposed communication of layers (tp 30%, cp 10%), of which pairs hide 18%" in why
    left = "pairs leave 22% exposed and auto, which has no barriers between them, 4%, so barriers "
    assert f"{left}leave 18%: that gain needs" in why
    assert why.endswith("; megatron is predicted 20% faster than their bar")
    assert "needs a baseline that exposed less, or" in _why(1.05, None)
    assert _why(9.0, None).endswith("that gain needs a baseline that exposed more")
    as_published = _why(1.13, 80.0)
    assert as_published.startswith("as published: ")
    slower = (
        "; megatron is predicted 25% slower than their bar, and if nothing were exposed 25% faster"
    )
    assert as_published.endswith(slower), "which is told of gains as published too"


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


def test_the_table_that_is_kept_has_all_of_them_and_says_what_follows_from_it() -> None:
    newest = max(TABLES.glob("published-predicted-*.json"))
    kept = json.loads(newest.read_text())
    rows = kept["rows"]
    assert [row["case"] for row in rows] == [case.name for case in CASES]
    assert [row["published"] for row in rows] == [case.gain for case in CASES]
    assert [row["published TFLOP/s"] for row in rows] == [case.rate for case in CASES]
    assert kept[APART] == reasons(rows, kept[SPENT])
    tables = {title: kept[title] for title in (ASSUMED, SPENT, APART)}
    notes = {name: kept[name] for name in ("profile", "limits")}
    text = Report(kept["benchmark"], kept["device"], COLUMNS, notes, rows, tables).table()
    assert newest.with_suffix(".txt").read_text() == f"{kept['date'][:10]} {text}\n"


def test_an_unknown_bar_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'A40 Llama 7B' is no published bar: use A40 Llama 8B"):
        bench_command(["published", "--cases=['A40 Llama 7B']"])
    with pytest.raises(ValueError, match="--evaluations 0 must be at least 1"):
        bench_command(["published", "--evaluations=0"])
