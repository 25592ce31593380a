"""The GPU's way through the benchmarks of overlap, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_dhellam.bench.command import bench_command

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("link", ["copy:110", "16sm:200"])
def test_a_cell_is_measured_on_a_gpu(link: str, tmp_path: Path) -> None:
    words = ["--miniature=true", "--rounds=1", "--repeats=2", f"--links=[{link}]", "--levers=true"]
    assert bench_command(["overlap", *words, "--cells=[a4]", f"--output={tmp_path}"]) == 0
    (file,) = tmp_path.glob("overlap-*.json")
    found = json.loads(file.read_text())
    assert not [name for name in found if name.startswith("FAILED")], found
    rows = {row["plan"]: row for row in found["rows"] if row["cell"] == f"a4 {link}"}
    assert rows["auto"]["peak GiB"] > 0 and rows["auto"]["layer ms"] > 0
    plans = [row for name, row in rows.items() if name not in ("bound", "compute")]
    assert [row["parity"] for row in plans] == [0.0] * len(plans), "bitwise, on a GPU too"
    assert any(tmp_path.glob("overlap-a4-*.png"))


def test_memory_is_predicted_and_does_not_grow_on_a_gpu(tmp_path: Path) -> None:
    names = ["selective", "auto", "tp 4", "first of 4 stages"]
    words = ["--miniature=true", f"--cases={json.dumps(names)}", f"--output={tmp_path}"]
    assert bench_command(["memory", *words]) == 0
    (file,) = tmp_path.glob("memory-*.json")
    for row in json.loads(file.read_text())["rows"]:
        name = row["case"]
        assert abs(row["slots error"]) < 0.03, f"{name}: kernels of a GPU save what they need"
        assert row["retries"] == row["growth MiB"] == 0, name
        assert row.get("parity", 0.0) == 0.0, f"{name}: bitwise, on a GPU too"
