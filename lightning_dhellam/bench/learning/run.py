"""Lets every precision learn in turn, and says after each how far it is from bf16."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from lightning_dhellam.bench.learning.report import COLUMNS, draw, row_of
from lightning_dhellam.bench.learning.settings import BF16, Settings
from lightning_dhellam.bench.learning.side import Curve, learn
from lightning_dhellam.bench.learning.text import described, prepared
from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.bench.report import Report, device_name, pick_device
from lightning_dhellam.models import parameter_count


def measure(settings: Settings, folder: Path) -> Report:
    """Let each precision learn what is left of its steps, as far as the budget goes."""
    budget, device = Budget(settings.budget), pick_device(settings.device)
    place = folder / "learning"
    place.mkdir(parents=True, exist_ok=True)
    report = Report("learning", device_name(device), COLUMNS)
    report.notes["text"] = described(settings.packages)
    report.notes["parameters"] = parameter_count(settings.config)
    data = prepared(settings.packages, settings.vocab_size, place / "data")
    print(f"learning: {report.notes['text']}, prepared; {budget.left:.0f} s left", flush=True)
    curves: dict[str, Curve] = {}
    failures: dict[str, str] = {}
    for name in settings.precisions:
        try:
            curves[name] = learn(settings, name, data.path, place, device, budget)
        except Exception as error:  # costs its own row
            traceback.print_exc()
            failures[name] = f"{name}: {type(error).__name__}: {error}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
        _fill(report, curves, failures)
        picture = report.save(folder).with_suffix(".png")
        draw(curves, picture)
        print(f"learning {name}: {report.rows[-1]} ({budget.left:.0f} s left)", flush=True)
    return report


def _fill(report: Report, curves: dict[str, Curve], failures: dict[str, str]) -> None:
    rows = [row_of(name, curve, curves.get(BF16)) for name, curve in curves.items()]
    rows += [{"precision": name, "failed": text} for name, text in failures.items()]
    report.rows[:] = rows
