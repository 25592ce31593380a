"""`dhellam bench NAME [options]`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench import (
    gemms,
    kernels,
    launch,
    overlap,
    pairs,
    pipeline,
    several,
    throughput,
    two_hosts,
)
from lightning_dhellam.bench.report import Report
from lightning_dhellam.files import check_folder


@dataclass(frozen=True)
class Benchmark:
    """One registered benchmark.

    Attributes:
        description: one line.
        add_options: adds what can be varied.
        run: measures. What fails is a row that says so, and the exit code is 1 then.
    """

    description: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Report]


BENCHMARKS = {
    "gemms": Benchmark(gemms.DESCRIPTION, gemms.add_options, gemms.run),
    "kernels": Benchmark(kernels.DESCRIPTION, kernels.add_options, kernels.run),
    "launch": Benchmark(launch.DESCRIPTION, launch.add_options, launch.run),
    "overlap": Benchmark(overlap.DESCRIPTION, overlap.add_options, overlap.run),
    "pairs": Benchmark(pairs.DESCRIPTION, pairs.add_options, pairs.run),
    "pipeline": Benchmark(pipeline.DESCRIPTION, pipeline.add_options, pipeline.run),
    "several": Benchmark(several.DESCRIPTION, several.add_options, several.run),
    "two-hosts": Benchmark(two_hosts.DESCRIPTION, two_hosts.add_options, two_hosts.run),
    "throughput": Benchmark(throughput.DESCRIPTION, throughput.add_options, throughput.run),
}


def bench_command(argv: Sequence[str]) -> int:
    """Run one benchmark, print its table and write its files. Returns the exit code."""
    words = list(argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print("usage: dhellam bench NAME [options]\n")
        print("\n".join(f"  {n:<12}{b.description}" for n, b in BENCHMARKS.items()))
        return 0 if words else 2
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark '{name}': use {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    parser = ArgumentParser(prog=f"dhellam bench {name}", description=benchmark.description)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for files")
    benchmark.add_options(parser)
    options = parser.parse_args(words[1:])
    check_folder(Path(options.output), f"--output {options.output}")
    report = benchmark.run(options)
    if os.environ.get("RANK", "0") != "0":
        return 0  # of several processes that torchrun has started, the first one writes
    print(report.table())
    print(f"written to {report.save(Path(options.output))}")
    return 1 if report.failures else 0
