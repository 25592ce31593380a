"""What the README says can be done, can be done."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_dhellam import recipes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(folder: Path, *words: str, timeout: float = 240) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "lightning_dhellam", *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_recipe_command_works_in_the_order_given(tmp_path: Path) -> None:
    commands = [shlex.split(line) for line in blocks("bash")[1].splitlines()]
    assert [words[:2] for words in commands] == [
        ["dhellam", "recipes"],
        ["dhellam", "data"],
        ["dhellam", "search"],
        ["dhellam", "fit"],
    ]
    listed = run(tmp_path, *commands[0][1:])
    assert [line.split()[0] for line in listed.splitlines()] == recipes.names()
    assert "vocabulary 4,096" in run(tmp_path, *commands[1][1:])
    found = run(tmp_path, *commands[2][1:])
    assert re.search(r"\* installed: '\w+'", found)
    assert len(re.findall(r"^use it with .* ?runs/search/plan\.json$", found, re.MULTILINE)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs"]
    shown = run(tmp_path, "plan", "show", "runs/search/plan.json")
    assert "forward transformer, backward transformer" in shown
    simulate, schedule = (shlex.split(line)[1:] for line in blocks("bash")[2].splitlines())
    assert re.search(r"^fold +[\d.]+ s ", run(tmp_path, *simulate), re.MULTILINE)
    assert "stage 3, chunks 3 and 4" in run(tmp_path, *schedule)
    assert all(
        (tmp_path / "runs" / file).is_file() for file in ("simulate/pipelines.png", "fold.png")
    )
    summary = run(tmp_path, *commands[3][1:])
    assert re.search(r"loss +8\.\d+ -> \d\.\d+ in 10 steps", summary)
    assert re.search(r"plan +runs/search/plan.json, tensor parallel 2, data parallel 1", summary)


def test_the_two_commands_are_the_demo_and_the_makefile_runs_it() -> None:
    assert blocks("bash")[0].splitlines() == ["pip install -e .", "dhellam demo"]
    assert re.search(r"^demo:.*\n\t.*dhellam demo$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_git_ignores_what_the_commands_write() -> None:
    outputs = re.findall(r"--output (\S+)", "".join(blocks("bash")))
    folders = {f"/{Path(output).parts[0]}/" for output in outputs}
    assert {"/data/", "/runs/"} <= folders <= set((ROOT / ".gitignore").read_text().splitlines())


def test_the_script_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs the README's script with its sizes cut down and no Trainer behind `fit`."""
    from lightning_dhellam.data import IndexedDataModule

    fitted = []
    monkeypatch.setattr(Trainer, "__init__", lambda self, **flags: fitted.append(flags))
    monkeypatch.setattr(Trainer, "fit", lambda self, module, data: fitted.append(module))
    monkeypatch.setattr(IndexedDataModule, "__init__", lambda self, *args, **kwargs: None)
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})
    flags, module = fitted
    assert flags["strategy"].tensor_parallel_size == 4
    assert module.model_config.num_layers == 8
    module.weight = torch.nn.Parameter(torch.zeros(2))
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


def test_every_name_the_readme_mentions_exists() -> None:
    from lightning_dhellam.models import PRESETS, export_llama, import_llama  # noqa: F401
    from lightning_dhellam.plan import BUILDERS
    from lightning_dhellam.precision import PRECISIONS

    plans = re.findall(r"^\| `(\w+)` \|", README.split("### Plans")[1], flags=re.MULTILINE)
    assert sorted(plans) == sorted([*BUILDERS, "auto"])
    precisions = re.findall(r"^\| `([\w-]+)` \| \w+ \| ", README, flags=re.MULTILINE)
    assert set(PRECISIONS) <= set(precisions)
    assert set(re.findall(r'preset\("([\w.-]+)"', README)) <= set(PRESETS)
    assert "llama-3.1-70b-8layers-8gpu" in recipes.names()
