"""`dhellam fit` as one rank of an emulated cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 64


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Some documents of Megatron's format."""
    builder = IndexedDatasetBuilder(f"{tmp_path}/corpus.bin", dtype=numpy.int32)
    draw = numpy.random.default_rng(3)
    for _ in range(40):
        builder.add_document(draw.integers(0, VOCABULARY, 100), [100])
    builder.finalize(f"{tmp_path}/corpus.idx")
    return tmp_path / "corpus"


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_recipe_runs_as_a_rank_of_a_shipped_cluster(
    accelerator: str, corpus: Path, tmp_path: Path
) -> None:
    words = {
        "trainer.accelerator": accelerator,
        "trainer.devices": "1",
        "trainer.strategy.tensor_parallel_size": "8",
        "trainer.strategy.emulate": "h200-node",
        "trainer.strategy.plan": "interleaved",
        "trainer.max_steps": "3",
        "trainer.log_every_n_steps": "1",
        "trainer.limit_val_batches": "0",
        "trainer.enable_checkpointing": "false",
        "trainer.default_root_dir": str(tmp_path),
        "model.overrides": f"{{vocab_size: {VOCABULARY}, num_layers: 2, num_query_groups: 8}}",
        "data.path": str(corpus),
        "data.vocab_size": str(VOCABULARY),
        "data.sequence_length": "64",
        "data.split": "1,0,0",
    }
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = [
        sys.executable,
        "-m",
        "lightning_dhellam",
        "fit",
        "--config",
        "llama-tiny-2cpu",
    ]
    done = subprocess.run(
        [*command, *(f"--{name}={value}" for name, value in words.items())],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EMULATED h200-node: rank 0 of 8, tp 370 GB/s on 16 SMs" in done.stderr
    assert "link tp: 370 GB/s on 16 SMs: 1 MiB" in done.stderr and "asked" in done.stderr
    assert "EMULATED    h200-node" in done.stdout, "the summary at the end"
    assert "in 3 steps" in done.stdout
    assert not list(tmp_path.rglob("*.ckpt"))
