"""`dhellam bench NAME [options]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench import kernels, launch, pipeline, throughput
from lightning_dhellam.bench.report import Report


@dataclass(frozen=True)
class Benchmark:
    """One registered benchmark.

    Attributes:
        description: one line.
        add_options: adds what can be varied.
        run: measures. Raises `RuntimeError` when what it would time computes wrong results.
    """

    description: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Report]


BENCHMARKS = {
    "kernels": Benchmark(kernels.DESCRIPTION, kernels.add_options, kernels.run),
    "launch": Benchmark(launch.DESCRIPTION, launch.add_options, launch.run),
    "pipeline": Benchmark(pipeline.DESCRIPTION, pipeline.add_options, pipeline.run),
    "throughput": Benchmark(throughput.DESCRIPTION, throughput.add_options, throughput.run),
}


def bench_command(argv: Sequence[str]) -> int:
    """Run one benchmark, print its table and write its JSON. Returns the exit code."""
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
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for JSON")
    benchmark.add_options(parser)
    options = parser.parse_args(words[1:])
    report = benchmark.run(options)
    print(report.table())
    print(f"written to {report.save(Path(options.output))}")
    return 0
