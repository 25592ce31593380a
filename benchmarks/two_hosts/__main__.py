"""`python -m benchmarks.two_hosts [options]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.two_hosts.run import measure
from benchmarks.two_hosts.settings import Settings
from lightning_dhellam.bench.benchmark import Benchmark

BENCHMARK = Benchmark(
    "two-hosts",
    "our plans and Megatron-core over a link of limited rate between two hosts (needs root)",
    Settings,
    measure,
)


def main(words: Sequence[str]) -> int:
    """Run the benchmark. Returns the exit code: 2 for an option that cannot be measured."""
    try:
        return BENCHMARK.command("python -m benchmarks.two_hosts", words)
    except ValueError as error:
        print(f"benchmarks.two_hosts: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
