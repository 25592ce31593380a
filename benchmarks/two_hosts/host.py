"""What each of the two hosts runs: `python -m benchmarks.two_hosts.host RANK SETTINGS`."""

from __future__ import annotations

import sys
import warnings

import torch.distributed as dist

from benchmarks.two_hosts.hosts import Host


def main(argv: list[str]) -> None:
    """Join the other host, and measure every side at every rate."""
    host = Host(int(argv[0]))
    warnings.simplefilter("ignore")
    # Not before: the benchmark lays the cable meanwhile, and a host ends with it from here on.
    from benchmarks.two_hosts.measure import measure
    from benchmarks.two_hosts.settings import Settings

    host.join()
    try:
        measure(host, Settings.from_json(argv[1]))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
