"""Measures every side of every case, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.bench.report import Report, pick_device
from lightning_dhellam.bench.throughput.report import COLUMNS, add
from lightning_dhellam.bench.throughput.settings import Settings
from lightning_dhellam.bench.throughput.workers import Workers


def measure(settings: Settings, folder: Path) -> Report:
    """Measure the sides of the cases, as many as the budget allows."""
    budget = Budget(settings.budget)
    device = pick_device(settings.device)
    # Only the processes ask the device for its name: it would keep memory of this one.
    report = Report("throughput", device.type, COLUMNS, {"plan": settings.plan})
    jobs = settings.jobs()
    with Workers(folder / "throughput.log", budget, settings.limit) as workers:
        for number, job in enumerate(jobs, 1):
            print(f"throughput {number}/{len(jobs)}: {job.case} {job.side}", flush=True)
            result = workers.run(job, more=number < len(jobs))
            add(report, job, result, settings.peak_tflops)
            report.save(folder)
            print(f"  {report.rows[-1]} ({budget.left:.0f} s left)", flush=True)
    return report
