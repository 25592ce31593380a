"""The scripts for hosts with several GPUs: what they call exists, and a part that hangs ends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from lightning_dhellam.bench.command import BENCHMARKS
from lightning_dhellam.bench.overlap.settings import Settings as Overlap
from lightning_dhellam.bench.several.settings import Settings as Several
from lightning_dhellam.commands.main import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/multi_gpu"
CALLS = [
    "four.sh",
    "eight.sh",
    *(f"two.sh {part}" for part in ("tests", "rows", "alone", "predictions")),
]


def run(call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    script, *words = call.split()
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(FOLDER / script), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def parts(call: str, **variables: str) -> dict[str, list[str]]:
    """The command of each part."""
    found = run(call, DRY="1", **variables)
    assert found.returncode == 0, found.stderr
    lines = [shlex.split(line) for line in found.stdout.splitlines()]
    assert all(int(seconds) > 0 for _, seconds, *_ in lines)
    return {name: command for name, _, *command in lines}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("call", CALLS)
def test_every_command_can_be_read(
    call: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = parts(call, DEVICE=device)
    assert len(found) >= 3
    for command in found.values():
        if command[0] == "env":
            assert command[1].startswith("CUDA_VISIBLE_DEVICES=")
            command = command[2:]
        assert command[0] == sys.executable
        module = command.index("-m")
        words = command[module + 2 :]
        if command[module + 1] == "pytest":
            check_tests(words)
        elif words[0] == "bench":
            check_bench(words[1], words[2:], device)
        else:
            # It can be read, but of what it asks for there is nothing yet.
            assert main(words) == 2 and "is no file of" in capsys.readouterr().err


def check_tests(words: list[str]) -> None:
    files = [ROOT / word for word in words if word.endswith(".py")]
    assert files and all(file.exists() for file in files), files
    if "-k" in words:
        chosen = words[words.index("-k") + 1]
        Expression.compile(chosen)
        text = "".join(file.read_text() for file in files)
        words = chosen.replace("(", " ").replace(")", " ").split()
        names = [word for word in words if word.replace("_", "").isalpha()]
        assert all(name in text for name in names if name not in ("or", "and", "not")), names


def check_bench(name: str, words: list[str], device: str) -> None:
    settings, folder = BENCHMARKS[name].parse(f"dhellam bench {name}", words)
    assert settings.device == device and folder.is_relative_to("runs/multi_gpu")
    if isinstance(settings, Overlap):
        assert settings.cells is not None
        cells = [cell.name for cell in settings.chosen_cells()]
        assert all(any(map(str.startswith, cells, [word] * len(cells))) for word in settings.cells)
    if isinstance(settings, Several):
        assert settings.limit < settings.budget
        # With what a GPU of this size can hold; as many ranks as the script's host has.
        assert all(job.config(141e9).num_layers >= 2 for job in settings.jobs())


@pytest.mark.parametrize(("call", "most"), [("four.sh", 4), ("eight.sh", 8), ("two.sh rows", 2)])
def test_cases_are_for_as_many_gpus(call: str, most: int) -> None:
    for command in parts(call).values():
        if "several" in command:
            words = command[command.index("several") + 1 :]
            settings, _ = BENCHMARKS["several"].parse("dhellam bench several", words)
            assert {job.ranks for job in settings.jobs()} == {most}


def test_more_than_twelve_runs_are_predicted() -> None:
    """Of ours, by case, micro-batches, plan and schedule; and all of them are compared."""
    runs, compared = 0, ""
    for name, command in parts("two.sh predictions").items():
        if "several" in command and name != "rival":
            words = command[command.index("several") + 1 :]
            settings, _ = BENCHMARKS["several"].parse("dhellam bench several", words)
            each = len(settings.schedules("ours")) or len(settings.plans)
            runs += len(settings.cases) * len(settings.counts) * each
            compared += f"-{name}"
    assert runs > 12 and f"compare{compared}" in parts("two.sh predictions")


def test_a_part_that_hangs_is_ended_and_told(tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\n[ $1 = -c ] && exit 1\necho "$@"\nexec sleep 1000\n')
    stub.chmod(0o755)
    variables = {"FOLDER": str(tmp_path), "PYTHON": str(stub), "LIMIT": "2", "LEAST": "1"}
    found = run("four.sh", **variables)
    assert found.returncode == 1
    first, *others = (tmp_path / "parts.txt").read_text().splitlines()
    assert first.startswith("tests: code 124, ") and "tests/gpu/test_sizes.py" in found.stdout
    assert [line.partition(": ")[0] for line in others] == ["pp4", "cp4", "ep4", "tp4"]
    assert all("not begun" in line for line in others)


def test_the_cheapest_part_runs(tmp_path: Path) -> None:
    row = {"case": "a2 tp2 pp1", "side": "ours", "plan": "sequential", "layers": 2}
    report = {"benchmark": "several", "rows": [{**row, "step ms": 100.0}]}
    file = tmp_path / "staged" / "several-2-cpu.json"
    file.parent.mkdir()
    file.write_text(json.dumps(report))
    name = "compare-tp2-staged-shared"
    variables = {"FOLDER": str(tmp_path), "DEVICE": "cpu", "ONLY": name}
    found = run("two.sh predictions", **variables)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "a2 tp2 pp1 m4 sequential" in (tmp_path / f"{name}.log").read_text()
    assert f"{name}: code 0, " in (tmp_path / "parts.txt").read_text()


def test_a_call_that_is_none_is_refused() -> None:
    found = run("two.sh everything")
    assert found.returncode == 2 and "tests|rows|alone|predictions" in found.stderr
