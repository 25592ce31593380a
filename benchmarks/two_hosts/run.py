"""Measures every side at every rate of the link."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path

from benchmarks.two_hosts.hosts import check_tools, two_hosts
from benchmarks.two_hosts.report import COLUMNS, note_of, rows_of
from benchmarks.two_hosts.settings import Settings
from lightning_dhellam.bench.report import Report


def measure(settings: Settings, folder: Path) -> Report:
    """Start the hosts, and note what they report of each rate.

    Raises:
        ValueError: Hosts cannot be made on this machine.
    """
    check_tools()
    told = asdict(settings)
    report = Report("two-hosts", "CPU", COLUMNS, {"CPU": cpu_model(), "settings": told})
    with two_hosts("benchmarks.two_hosts.host", told) as results:
        for result in results:
            report.rows += rows_of(result)
            report.notes[f"{result['rate']:g} Gbit/s"] = note_of(result)
            report.save(folder)
            print(f"{result['rate']:g} Gbit/s done", flush=True)
    return report


def cpu_model() -> str:
    """What the kernel calls this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
