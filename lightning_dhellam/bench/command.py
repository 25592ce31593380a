"""`dhellam bench NAME [options]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dhellam.bench import (
    checkpoint,
    convert,
    gemms,
    kernels,
    launch,
    learning,
    memory,
    overlap,
    pairs,
    pipeline,
    published,
    several,
    throughput,
)
from lightning_dhellam.bench.benchmark import Benchmark

BENCHMARKS: Mapping[str, Benchmark[Any]] = {
    benchmark.name: benchmark
    for benchmark in (
        checkpoint.BENCHMARK,
        convert.BENCHMARK,
        gemms.BENCHMARK,
        kernels.BENCHMARK,
        launch.BENCHMARK,
        learning.BENCHMARK,
        memory.BENCHMARK,
        overlap.BENCHMARK,
        pairs.BENCHMARK,
        pipeline.BENCHMARK,
        published.BENCHMARK,
        several.BENCHMARK,
        throughput.BENCHMARK,
    )
}


def bench_command(argv: Sequence[str]) -> int:
    """Run one benchmark, print its table and write its files. Returns the exit code.

    Raises:
        ValueError: There is no such benchmark, or one of its options cannot be measured.
    """
    words = list(argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print("usage: dhellam bench NAME [options]\n")
        print("\n".join(f"  {b.name:<12}{b.description}" for b in BENCHMARKS.values()))
        return 0 if words else 2
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark '{name}': use {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name].command(f"dhellam bench {name}", words[1:])
