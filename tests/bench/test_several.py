"""The benchmark of several GPUs, rehearsed on processes of the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_dhellam.bench.several import run
from lightning_dhellam.bench.several.job import Job
from lightning_dhellam.bench.several.report import compare
from lightning_dhellam.bench.several.settings import Settings
from lightning_dhellam.commands.main import main

WORDS = ["bench", "several", "--device=cpu", "--vocabulary=512", "--rounds=1", "--steps=1"]
WORDS += ["--budget=1e6", "--limit=1e6"]  # however slow the machine is
JOB = Job("ours", "a", 40, 512, (4,), 2, 1, "cpu", 1, 1)


def _rows(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("several-*.json")
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert not [row["failed"] for row in rows if "failed" in row]
    return rows


@pytest.mark.timeout(1200)  # up to five processes, on a machine that may have other things to do
@pytest.mark.parametrize("case", ["a:2:2:1", "e:2:1:1:2", "m:2:1:1:1:2"])
def test_all_sides_train_the_same(case: str, tmp_path: Path) -> None:
    options = [f"--cases=['{case}']", f"--output={tmp_path}"]
    assert main([*WORDS, *options]) == 0
    rows = _rows(tmp_path)
    theirs, *others = rows
    assert theirs["side"] == "megatron-core"
    ours = [row for row in others if row["side"] == "ours"]
    assert {"sequential", "megatron", "dhellam", "auto"} <= {row["plan"] for row in ours}
    for row in ours:
        assert row["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert row["grad norm"] == pytest.approx(theirs["grad norm"], rel=1e-4)
        expected = theirs["step ms"] / row["step ms"]
        assert row["over megatron-core"] == pytest.approx(expected)
    (installed,) = [row for row in ours if "whole ms" in row]
    assert installed["whole ms"] > 0 and installed["details"]["search"]["profile"] > 0
    emulated = {row["plan"]: row for row in others if row["side"] == "emulated"}
    assert bool(emulated) == (case == "a:2:2:1"), "one process plays one link"
    if emulated:
        assert emulated["ours"]["of real"] == pytest.approx(
            emulated["ours"]["step ms"] / installed["step ms"]
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
            assert len(row["details"]["steps s"]) == step
        assert set(chosen["details"]["behind"]) == {"fold", "zb-v", "dualpipe-v", "searched"}


def test_what_was_measured_before_a_side_failed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"micro-batches": 4, "schedule": "1f1b", "seconds": 2.0, "step s": 2.5, "layers": 8}]
    rows[0] |= {"loss": 6.0, "grad norm": 1.0, "peak GiB": None}
    found = {"device": "CPU", "whole": False, "measured": rows}
    (tmp_path / "ends.py").write_text(
        "import pathlib, sys\n"
        f"pathlib.Path(sys.argv[1], 'result.json').write_text({json.dumps(found)!r})\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(run, "_modules", lambda job: ["ends"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ["--cases=['a:8:1:2']", "--sides=[megatron-core]", f"--output={tmp_path}"]
    assert main([*WORDS, *options]) == 1
    (file,) = tmp_path.glob("several-*.json")
    measured, failed = json.loads(file.read_text())["rows"]
    assert measured["step ms"] == 2000.0 and "ended with code 3" in failed["failed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sides=['ours:zb']"], "'ours:zb' is not a side: use megatron-core"),
        (["--sides=['megatron-core:1']"], "'megatron-core:1' is not a side"),
        (["--sides=['ours:zb-v']", "--cases=['a:8:2:1']"], "'a8 tp2 pp1' has one stage"),
        (["--micro_batches=[4,0]"], "--micro_batches: (4, 0) must be at least 1"),
    ],
)
def test_sides_that_are_none_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *options, f"--output={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "case", ["a:8:2", "a:8:2:1:1:1:1", "c:8:2:1", "z:8:2:1", "a:8:0:1", "a:x:2:1"]
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
    # One of its processes is enough: it fails before it talks to the others.
    modules = run._modules
    monkeypatch.setattr(run, "_modules", lambda job: modules(job)[-1:])
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    options = ["--cases=['a:1:3:1']", "--sides=[megatron-core]", f"--output={tmp_path}"]
    assert main([*WORDS, *options]) == 1
    (file,) = tmp_path.glob("several-*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert "ended with code 1: see" in row["failed"]
    log = Path(row["failed"].rpartition("see ")[2]).read_text()
    assert "the world size is 1: set devices" in log and "tensor_parallel_size" in log


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
