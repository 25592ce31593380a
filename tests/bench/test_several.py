"""The benchmark of several GPUs, rehearsed on processes of the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.bench.several import run, settings, starting
from lightning_dhellam.bench.several.job import Job
from lightning_dhellam.bench.several.report import compare
from lightning_dhellam.bench.several.settings import Settings
from lightning_dhellam.commands.main import main
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import Profile

WORDS = ["bench", "several", "--device=cpu", "--vocabulary=512", "--repeats=1", "--steps=1"]
WORDS += ["--budget=1e6", "--limit=1e6"]  # however slow the machine is
QUICK = ["--search_time=0.1", "--plans=[sequential,megatron,auto]"]
JOB = Job("ours", "a", 40, 512, (4,), 2, 1, "cpu", 1)


def _rows(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("several-*.json")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert not [row["failed"] for row in rows if "failed" in row]
    return rows


@pytest.mark.timeout(1200)  # up to five processes, on a machine that may have other things to do
@pytest.mark.parametrize("case", ["a:2:2:1", "e:2:1:1:2", "m:2:1:1:1:2"])
def test_all_sides_train_the_same(case: str, tmp_path: Path) -> None:
    options = [f"--cases=['{case}']", f"--output={tmp_path}"]
    assert main([*WORDS, *QUICK, *options]) == 0
    rows = _rows(tmp_path)
    theirs, *others = rows
    assert theirs["side"] == "megatron-core"
    ours = [row for row in others if row["side"] == "ours"]
    assert [row["plan"] for row in ours] == ["sequential", "megatron", "auto"]
    for row in ours:
        assert row["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert row["grad norm"] == pytest.approx(theirs["grad norm"], rel=1e-4)
        expected = theirs["step ms"] / row["step ms"]
        assert row["over megatron-core"] == pytest.approx(expected)
        assert row["whole ms"] > row["step ms"] and row["predicted ms"] > 0
        phases = row["details"]["phases"]
        assert phases.keys() == {"model", "first step", "profile", "search"}
    fastest = min(ours, key=lambda row: float(row["step ms"]))
    home = tmp_path / "several" / theirs["case"].replace(" ", "-") / "ours"
    assert PlanFile.load(home / "plan.json").notes["plan"] == fastest["plan"]
    assert Profile.load(home / "profile.json").timings
    emulated = {row["plan"]: row for row in others if row["side"] == "emulated"}
    assert bool(emulated) == (case == "a:2:2:1"), "one process plays one link"
    if emulated:
        assert emulated["ours"]["of real"] == pytest.approx(
            emulated["ours"]["step ms"] / fastest["step ms"]
        )
        assert "loss" not in emulated["ours"], "an emulated rank's numbers mean nothing"


@pytest.mark.timeout(1200)
def test_schedules_are_sides_that_train_the_same(tmp_path: Path) -> None:
    sides = ["megatron-core", "megatron-core:2", "ours:zb-v", "ours:auto"]
    options = ["--cases=['a:4:1:2']", "--micro_batches=[2,4]", f"--sides=[{','.join(sides)}]"]
    assert main([*WORDS, *options, f"--output={tmp_path}"]) == 0
    rows = _rows(tmp_path)
    theirs = [row for row in rows if row["side"] == "megatron-core"]
    ours = [row for row in rows if row["side"] == "ours"]
    known = ["1f1b", "interleaved-1f1b, 2 chunks"]
    assert [(row["schedule"], row["micro-batches"]) for row in theirs] == [
        (name, count) for name in known for count in (2, 4)
    ]
    for count, step in ((2, 1), (4, 1)):
        straight, interleaved = (row for row in theirs if row["micro-batches"] == count)
        walked, chosen = (row for row in ours if row["micro-batches"] == count)
        assert walked["schedule"] == "zb-v" and chosen["schedule"].startswith("auto: ")
        for row in (walked, chosen, interleaved):
            assert row["loss"] == pytest.approx(straight["loss"], rel=1e-6)
            assert row["grad norm"] == pytest.approx(straight["grad norm"], rel=1e-4)
        for row in (walked, chosen):
            assert row["over megatron-core"] == pytest.approx(straight["step ms"] / row["step ms"])
            assert row["over interleaved"] == pytest.approx(interleaved["step ms"] / row["step ms"])
            assert row["error"] == pytest.approx(row["predicted ms"] / row["step ms"] - 1)
            assert len(row["details"]["steps s"]) == step and row["plan"] == "sequential"
        assert set(chosen["details"]["behind"]) == {"fold", "zb-v", "dualpipe-v", "searched"}


ROW = {"micro-batches": 2, "schedule": "1f1b", "seconds": 2.0, "step s": 2.5, "layers": 8}
ROW |= {"loss": 6.0, "grad norm": 1.0, "peak GiB": None, "row": "megatron-core"}


def _side(folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Let the processes of a side be one that writes a row, and then does this."""
    found = {"device": "CPU", "whole": False, "measured": [ROW]}
    (folder / "side.py").write_text(
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "while not (folder / 'job.json').exists(): time.sleep(0.01)\n"
        f"(folder / 'result.json').write_text({json.dumps(found)!r})\n"
        f"{ending}\n"
    )
    monkeypatch.setattr(starting, "modules", lambda job: ["side"])
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("sys.exit(3)", "ended with code 3: see"), ("time.sleep(9e9)", "stopped after 1000000 s")],
)
def test_what_was_measured_before_a_side_failed_is_kept_and_the_rest_is_named(
    ending: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Limit(Budget):
        """Is over once there is a row, if the side does not end by itself."""

        @property
        def left(self) -> float:
            row = next(tmp_path.rglob("result.json"), None)
            return 1e6 if row is None or "exit" in ending else 0.0

    _side(tmp_path, monkeypatch, ending)
    monkeypatch.setattr(run, "Budget", Limit)
    options = ["--cases=['a:8:1:2']", "--sides=[megatron-core,'megatron-core:2']"]
    options += ["--micro_batches=[2,4]", f"--output={tmp_path}"]
    assert main([*WORDS, *options]) == 1
    (file,) = tmp_path.glob("several-*.json")
    measured, failed = json.loads(file.read_text())["rows"]
    assert measured["step ms"] == 2000.0 and failed["failed"].startswith(reason)
    missing = ("megatron-core of 4", "megatron-core:2 of 2", "megatron-core:2 of 4")
    named = ", ".join(f"{name} micro-batches" for name in missing)
    assert failed["failed"].endswith(f"; not measured: {named}")


def test_what_a_side_has_measured_is_in_the_files_while_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = (
        "for _ in range(30000):\n"
        f"    if list(pathlib.Path({str(tmp_path)!r}).glob('several-*.txt')): sys.exit(4)\n"
        "    time.sleep(0.01)\n"
    )
    _side(tmp_path, monkeypatch, ending)
    options = ["--cases=['a:8:1:2']", "--sides=[megatron-core]", f"--output={tmp_path}"]
    assert main([*WORDS, *options, "--micro_batches=2"]) == 1
    (file,) = tmp_path.glob("several-*.json")
    assert "ended with code 4" in json.loads(file.read_text())["rows"][1]["failed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sides=['ours:zb']"], "'ours:zb' is not a side: use megatron-core"),
        (["--sides=['megatron-core:1']"], "'megatron-core:1' is not a side"),
        (["--sides=['ours:zb-v']", "--cases=['a:8:2:1']"], "'a8 tp2 pp1' has one stage"),
        (["--micro_batches=[4,0]"], "--micro_batches: (4, 0) must be at least 1"),
        (["--plans=[sequential,best]"], "--plans: 'best' is not a plan: use sequential"),
        (["--search_time=0"], "--search_time 0.0 must be more than 0 seconds"),
        (["--repeats=0"], "--repeats 0 must be at least 1"),
        (["--sides=['megatron-core:tp-overlap']"], "computes on GPUs alone: leave it out of"),
    ],
)
def test_sides_that_are_none_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *options, f"--output={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_an_overlap_that_cannot_be_had_is_refused_with_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sides = ("megatron-core:tp-overlap",)
    monkeypatch.setattr(settings, "has_transformer_engine", lambda: False)
    with pytest.raises(ValueError, match=r"pip install .*'transformer-engine\[pytorch\]'"):
        Settings(cases=("a:8:2:1",), sides=sides)
    monkeypatch.setattr(settings, "has_transformer_engine", lambda: True)
    with pytest.raises(ValueError, match="'a8 tp1 pp2' is not: give one such as a:8:2:1"):
        Settings(cases=("a:8:1:2",), sides=sides)
    with pytest.raises(ValueError, match="is measured of dense layers, but shape m has experts"):
        Settings(cases=("m:4:2:1",), sides=sides)
    job = Settings(cases=("a:8:2:1",), sides=sides).jobs()[0]
    (turn,) = run._turns(job, Settings(cases=("a:8:2:1",), sides=sides), Path())
    assert turn.side == sides[0] and turn.job.tp_overlap and turn.job.transformer_engine
    assert starting._environment(turn.job)["UB_SKIPMC"] == "1"


def test_their_layers_with_experts_need_no_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "has_transformer_engine", lambda: True)
    given = Settings(cases=("m:4:1:2", "e:4:1:1:2"), sides=("megatron-core",))
    turns = [turn for job in given.jobs() for turn in run._turns(job, given, Path())]
    assert [turn.job.transformer_engine for turn in turns] == [False, True]


@pytest.mark.parametrize(
    "case", ["a:8:2", "a:8:2:1:1:1:1:1", "c:8:2:1", "z:8:2:1", "a:8:0:1", "a:x:2:1"]
)
def test_a_case_that_is_none_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, f"--cases=['{case}']", f"--output={tmp_path}"]) == 2
    assert f"--cases: '{case}' is not shape:layers:tensor:pipeline" in capsys.readouterr().err


@pytest.mark.parametrize(("case", "experts"), [("a:8:2:1:1:2", "none"), ("m:8:1:1:1:3", "16")])
def test_experts_that_cannot_be_shared_are_refused(
    case: str, experts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, f"--cases=['{case}']", f"--output={tmp_path}"]) == 2
    shape = case[0]
    assert f"but shape {shape} has {experts}: give a divisor" in capsys.readouterr().err


def test_a_job_that_fails_costs_its_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "side.py").write_text("import sys\nsys.exit('the world size is 1')\n")
    monkeypatch.setattr(starting, "modules", lambda job: ["side"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["--cases=['a:1:3:1']", "--sides=[megatron-core,ours]", f"--output={tmp_path}"]
    assert main([*WORDS, *options]) == 1
    (file,) = tmp_path.glob("several-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["side"] for row in rows] == ["megatron-core", "ours"]
    for row in rows:
        reason, _, log = row["failed"].partition(": see ")
        assert reason == "ended with code 1" and Path(log).read_text() == "the world size is 1\n"


def test_sides_that_train_something_else_are_not_compared() -> None:
    def rows(norm: float) -> list[dict[str, Any]]:
        same = {"case": "a8", "plan": "-", "step ms": 2.0, "loss": 12.0}
        return [
            {**same, "side": "megatron-core", "grad norm": norm},
            {**same, "side": "ours", "step ms": 1.0, "grad norm": 14.5},
        ]

    theirs, ours = found = rows(14.49)
    compare(found)
    assert ours["over megatron-core"] == 2.0 and "failed" not in theirs
    for wrong in (6.5, float("nan")):
        theirs, ours = found = rows(wrong)
        compare(found)
        assert "over megatron-core" not in ours
        assert theirs["failed"].endswith(f"grad norm {wrong:g}, ours 14.5")


def test_layers_that_do_not_fit_are_left_out() -> None:
    assert JOB.config(1e18).num_layers == 40
    large, small = (JOB.config(memory).num_layers for memory in (4e6, 2e6))
    assert 1 <= small < large < 40
    staged = replace(JOB, tensor=1, pipeline=2)
    assert staged.config(4e6).num_layers % 2 == 0
    assert JOB.config(1.0).num_layers == 1, "one layer is tried in any case"


def test_what_a_real_machine_trains_fits_by_the_published_sizes() -> None:
    """18 bytes of state for each weight, and activations, of one H200 among two."""

    cases = ("b:40:2:1", "a:8:2:1", "m:8:1:1:1:2", "m:8:1:1")
    shared, alone, spread, gathered = Settings(cases=cases).jobs()
    layers = shared.config(141e9).num_layers
    assert 10 <= layers <= 22
    assert alone.config(141e9).num_layers == 8
    assert spread.config(141e9).num_layers == 8
    assert 4 <= gathered.config(141e9).num_layers < 8, "all experts on one"
