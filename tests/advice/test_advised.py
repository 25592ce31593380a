"""A recipe that advice has written is trained by, and compared with what was predicted of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from lightning_dhellam.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 64
CLUSTER = {
    "world_size": 2,
    "device": {
        "name": "CPU",
        "flops": 5e10,
        "flops_fp32": 5e10,
        "memory": 8e9,
        "bandwidth": 1e10,
        "multiprocessors": 1,
    },
    "networks": {"node": 2, "inside": {"bandwidth": 1e9, "latency": 1e-4}},
    "source": "two processes of one machine, roughly",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster file, some documents of Megatron's format, and the advice for both."""
    found = tmp_path_factory.mktemp("advised")
    (found / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    builder = IndexedDatasetBuilder(f"{found}/corpus.bin", dtype=numpy.int32)
    draw = numpy.random.default_rng(3)
    for _ in range(40):
        builder.add_document(draw.integers(0, VOCABULARY, 100), [100])
    builder.finalize(f"{found}/corpus.idx")
    words = {
        "model": "llama-tiny",
        "overrides": f"{{vocab_size: {VOCABULARY}, num_layers: 2}}",
        "cluster": found / "cluster.yaml",
        "global-batch": 4,
        "sequence_length": 32,
        "precision": "32-true",
        "search_time": 0,
        "output": found / "advised.yaml",
    }
    assert main(["advise", *(f"--{name}={value}" for name, value in words.items())]) == 0
    return found


def test_the_recipe_runs_as_it_stands_and_its_step_is_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((folder / "advised.yaml").read_text())
    assert recipe["trainer"]["devices"] == 2 and recipe["trainer"]["accelerator"] == "cpu"
    words = {
        "trainer.max_steps": 4,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_checkpointing": "false",
        "trainer.limit_val_batches": 0,
        "trainer.default_root_dir": folder,
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "trainer.logger.save_dir": folder,
        "data.path": folder / "corpus",
        "data.vocab_size": VOCABULARY,
        "data.split": "1,0,0",
    }
    given = [f"--{name}={value}" for name, value in words.items()]
    # A process of its own: the launcher starts the other rank by the words of this one.
    command = [sys.executable, "-W", "ignore", "-m", "lightning_dhellam", "fit", "--config"]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [*command, str(folder / "advised.yaml"), *given],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 4 steps" in done.stdout
    logs = folder / "lightning_logs/version_0"
    kept = yaml.safe_load((logs / "config.yaml").read_text())
    own, given_by = (tree["trainer"]["strategy"]["init_args"] for tree in (kept, recipe))
    assert {name: own[name] for name in given_by} == given_by
    assert main(["compare", str(logs), "--cluster", str(folder / "cluster.yaml")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"version_0: .* ms, predicted +[\d.]+ \([+-][\d.]+%", line), line
    named = {"tensor": "tp", "pipeline": "pp", "context": "cp"}
    for name, short in named.items():
        size = own[f"{name}_parallel_size"]
        assert size == 1 or f"{short} {size}" in line


def test_what_a_configuration_leaves_open_is_given_by_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is asked for by the option that says it, and is no option of files of a benchmark."""
    recipe = yaml.safe_load((ROOT / "recipes/llama-tiny-pp2-2cpu.yaml").read_text())
    recipe["trainer"]["devices"] = "auto"
    for name in ("sequence_length", "batch_size"):
        del recipe["data"]["init_args"][name]
    recipe["data"]["class_path"] = "lightning.pytorch.LightningDataModule"
    recipe["data"]["init_args"] = {}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "metrics.csv").write_text("step,tokens_per_second\n1,2e3\n2,4e3\n3,6e3\n4,8e3\n")
    words = ["compare", str(tmp_path), "--cluster", "h200-64"]
    for option, value in (("ranks", "2"), ("batch_size", "8"), ("sequence_length", "128")):
        assert main(words) == 2
        assert f"give --{option}" in capsys.readouterr().err
        words += [f"--{option}", value]
    assert main(words) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "pp 2, 8 × 1" in line and "  " + f"{8 * 128 / 7e3 * 1e3:8.1f} ms" in line
    file = tmp_path / "several.json"
    file.write_text("{}")
    assert main(["compare", str(file), "--cluster", "h200-64", "--ranks", "2"]) == 2
    assert "--ranks 2 is for the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no metrics.csv: train with --trainer.logger CSVLogger, and give the folder"),
        ({"metrics.csv": "step,loss\n1,2.0\n"}, "has no tokens_per_second: train with"),
        ({"metrics.csv": "step,tokens_per_second\n1,2.0\n"}, "has no config.yaml, which"),
    ],
)
def test_a_folder_that_lacks_something_is_said_in_a_line(
    files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["compare", str(tmp_path), "--cluster", "h200-64"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
