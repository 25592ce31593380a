"""The results that are kept: small, complete, and named where they are explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "benchmarks"
REPORTS = [
    path for path in sorted(ROOT.rglob("*.json")) if "benchmark" in json.loads(path.read_text())
]
LARGEST_PICTURE = 100_000


def test_pictures_are_small() -> None:
    large = [path.name for path in ROOT.rglob("*.png") if path.stat().st_size > LARGEST_PICTURE]
    assert not large, f"above {LARGEST_PICTURE} bytes: save {large} with a palette of 64 colours"


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_a_report_says_where_it_comes_from_and_can_be_read(report: Path) -> None:
    found = json.loads(report.read_text())
    assert found["device"] and found["versions"]["torch"]
    assert found["rows"] or found["steps"]  # of trainings that save
    assert report.stem.endswith(found["date"][:10])
    text = report.with_suffix(".txt").read_text()
    assert f"{found['benchmark']} on {found['device']}" in text


def test_every_folder_of_results_is_explained() -> None:
    text = (ROOT / "README.md").read_text()
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.json")}
    assert folders and all(f"{folder}/" in text for folder in folders)
