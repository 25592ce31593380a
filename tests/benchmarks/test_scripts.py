"""The scripts for hosts with several GPUs: what they call exists, and they end in time and tell."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

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
    *(f"one.sh {part}" for part in ("steps", "memory", "links")),
    *(f"two.sh {part}" for part in ("tests", "rows", "predictions")),
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


class Part(NamedTuple):
    """What a script would run, and when at the latest: seconds."""

    begin: int
    limit: int
    command: list[str]


def parts(call: str, **variables: str) -> dict[str, Part]:
    found = run(call, DRY="1", **variables)
    assert found.returncode == 0, found.stderr
    lines = [shlex.split(line) for line in found.stdout.splitlines()]
    return {n: Part(int(begin), int(limit), command) for n, begin, limit, *command in lines}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("call", CALLS)
def test_every_command_can_be_read(
    call: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = parts(call, DEVICE=device)
    assert len(found) >= 2
    time = 560 * (1 if device == "cuda" else 8)
    for begin, limit, command in found.values():
        # Ten seconds are left for what is no part.
        assert limit > 0 and begin + limit <= time - 10
        if command[0] == "env":
            assert command[1].startswith("CUDA_VISIBLE_DEVICES=")
            command = command[2:]
        assert command[0] == sys.executable
        module = command.index("-m")
        words = command[module + 2 :]
        if command[module + 1] == "pytest":
            check_tests(words)
        elif words[0] == "bench":
            check_bench(words[1], words[2:], device, limit)
        else:
            # It can be read, but of what it asks for there is nothing yet.
            assert main(words) == 2 and "is no file of" in capsys.readouterr().err


def check_tests(words: list[str]) -> None:
    files = [word for word in words if word.endswith(".py")]
    assert files and all((ROOT / file).exists() for file in files), files
    if "-k" in words:
        chosen = Expression.compile(words[words.index("-k") + 1])
        for file in files:
            selected = [name for name in names(file) if chosen.evaluate(matcher(name))]
            assert selected, (file, words)


def matcher(name: str) -> Callable[..., bool]:
    return lambda word: word.lower() in name.lower()


def names(file: str) -> list[str]:
    """Of a file's tests, with what they are parametrised by."""
    if file == "tests/kernels/test_triton.py":  # which decides at its import how Triton runs
        return re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    found = []
    for name, function in vars(module).items():
        if name.startswith("test_"):
            marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
            sets = [mark.kwargs.get("ids") or mark.args[1] for mark in marks]
            each = [
                ["-".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]
                for values in sets
            ]
            found += [f"{name}[{'-'.join(reversed(values))}]" for values in product(*each)]
    return found


def check_bench(name: str, words: list[str], device: str, limit: int) -> None:
    settings, folder = BENCHMARKS[name].parse(f"dhellam bench {name}", words)
    assert settings.device == device and folder.is_relative_to("runs/multi_gpu")
    assert getattr(settings, "budget", 0) < limit
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
    for _, _, command in parts(call).values():
        if "several" in command:
            words = command[command.index("several") + 1 :]
            settings, _ = BENCHMARKS["several"].parse("dhellam bench several", words)
            assert {job.ranks for job in settings.jobs()} == {most}


def test_more_than_twelve_runs_are_predicted() -> None:
    """Of ours, by case, micro-batches, plan and schedule; and all of them are compared."""
    runs, compared = 0, ""
    found = parts("two.sh predictions")
    for name, (_, _, command) in found.items():
        if "several" in command and name != "rival":
            words = command[command.index("several") + 1 :]
            settings, _ = BENCHMARKS["several"].parse("dhellam bench several", words)
            each = len(settings.schedules("ours")) or len(settings.plans)
            runs += len(settings.cases) * len(settings.counts) * each
            compared += f"-{name}"
    assert runs > 12 and f"compare{compared}" in found


@pytest.mark.parametrize("call", ["four.sh", "one.sh memory"])
def test_when_time_is_short_benchmarks_end_before_they_are_ended(call: str) -> None:
    """So that their tables are printed, with the rows that are not measured."""
    budgets = [
        int(command[command.index("--budget") + 1])
        for _, _, command in parts(call, LIMIT="100").values()
        if "--budget" in command
    ]
    assert budgets and max(budgets) < 90


def stub(folder: Path, visible: int, does: str) -> dict[str, str]:
    """Variables for a Python that sees so many GPUs, has no rival and does something else."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in "-c import torch;"*) echo {visible}; exit ;;\n'
        f"-c*) exit 1 ;; esac\n{does}\n"
    )
    python.chmod(0o755)
    return {"FOLDER": str(folder / "found"), "PYTHON": str(python)}


def told(variables: dict[str, str]) -> list[str]:
    return (Path(variables["FOLDER"]) / "parts.txt").read_text().splitlines()


def test_a_part_that_hangs_is_ended_and_told(tmp_path: Path) -> None:
    variables = stub(tmp_path, 4, "exec sleep 1000")
    assert run("four.sh", **variables, ONLY="pp4", MOST="1").returncode == 1
    (line,) = told(variables)
    assert line.startswith("pp4: code 124, ")


def test_without_time_no_part_is_begun(tmp_path: Path) -> None:
    variables = stub(tmp_path, 4, "exit 0")
    assert run("four.sh", **variables, LEAST="1000").returncode == 1
    names = ["compare-pp4-cp4-ep4-tp4", "cp4", "ep4", "others", "pp4", "tests", "tp4"]
    assert sorted(line.partition(": not begun")[0] for line in told(variables)) == names


def test_a_call_is_judged_by_its_own_parts(tmp_path: Path) -> None:
    variables = stub(tmp_path, 4, 'echo "$@"; exit 3')
    found = run("four.sh", **variables, ONLY="tests")
    assert found.returncode == 1 and "tests/gpu/test_sizes.py" in found.stdout
    assert run("four.sh", **stub(tmp_path, 4, "exit 0"), ONLY="pp4").returncode == 0
    # Tests that were all skipped show nothing.
    skipping = stub(tmp_path, 4, 'echo "3 skipped in 0.1s"')
    assert run("four.sh", **skipping, ONLY="tests").returncode == 1
    passing = stub(tmp_path, 4, 'echo "1 passed, 3 skipped in 0.1s"')
    assert run("four.sh", **passing, ONLY="tests").returncode == 0
    endings = [line.rpartition(",")[0] for line in told(variables)]
    assert endings == [
        "tests: code 3",
        "pp4: code 0",
        "tests: code 0 with nothing done",
        "tests: code 0",
    ]


def test_the_links_come_first_where_nothing_is_installed(tmp_path: Path) -> None:
    """They are the package, and the folder beside `kernels` and `search` is not."""
    variables = stub(tmp_path, 4, 'echo "$PYTHONSAFEPATH $PYTHONPATH $*"')
    run("four.sh", **variables, ONLY="tests")
    first, words = (tmp_path / "found" / "tests.log").read_text().split(":", 1)
    assert first == f"1 {tmp_path / 'found' / 'package'}" and "-o pythonpath= " in words
    assert (tmp_path / "found" / "package" / "lightning_dhellam" / "kernels" / "norm.py").is_file()


def test_a_failure_is_told_before_the_end(tmp_path: Path) -> None:
    file = tmp_path / "test_ended.py"
    file.write_text(
        "import os\n\ndef test_fails():\n    assert 1 + 1 == 3\n\n"
        "def test_ends():\n    os._exit(9)\n"
    )
    words = ["-q", "-p", "benchmarks.multi_gpu.at_once", "-c", os.devnull, str(file)]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert found.returncode == 9 and "assert (1 + 1) == 3" in found.stdout


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    variables = stub(tmp_path, 2, "exit 0")
    found = run("four.sh", **variables)
    assert found.returncode == 2 and "needs 4 GPUs, and 2 are visible" in found.stderr
    found = run("two.sh rows", **variables, ONLY="typo")
    assert (
        found.returncode == 2 and "ONLY=typo is not a part: use one of ep2 cp2 pp2" in found.stderr
    )
    # There is nothing to compare, and transformer-engine cannot be imported.
    comparing = {**variables, "ONLY": "compare-tp2-staged-shared"}
    assert run("two.sh predictions", **comparing).returncode == 1
    found = run("two.sh predictions", **variables, ONLY="rival")
    assert found.returncode == 0 and "rival: without megatron-core:tp-overlap" in found.stderr
    file = tmp_path / "file"
    file.touch()
    found = run("two.sh rows", **{**variables, "FOLDER": str(file / "folder")})
    assert found.returncode == 2 and not found.stdout


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
    assert found.returncode == 2 and "tests|rows|predictions" in found.stderr
