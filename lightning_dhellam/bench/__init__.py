"""Benchmarks behind `dhellam bench`: each checks what it times, prints a table, writes JSON."""

from lightning_dhellam.bench.command import bench_command

__all__ = ["bench_command"]
