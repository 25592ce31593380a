"""Two hosts on one machine: processes in network namespaces of their own, joined by a slow link.

    host 0 (core 0)  10.77.0.1 ---- veth, token bucket each way ---- 10.77.0.2  host 1 (core 1)

The namespaces have no names: they belong to the two processes, and the kernel removes them, and
the link between them, when these end. They end with the benchmark, however it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_dhellam.bench.processes import end_with_parent

INTERFACE = "dhellam0"
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 29400
_MTU = 9000
"""Jumbo frames, as clusters have them."""
_BUCKET = 135_000
"""Bytes that may always leave at once: two of the largest packets that TCP makes."""
_CONGESTION = "reno"
"""Congestion control: every Linux has it, and lets a namespace choose it. BBR, which a machine may
prefer, took this link for a slower one at times."""
_CONGESTION_FILE = Path("/proc/sys/net/ipv4/tcp_congestion_control")
"""Of this process's network namespace."""
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc keeps what a step gives back for the next one, as allocators of GPUs do. By default large
blocks go to the kernel, and each result of an operator begins with page faults."""
_PATIENCE = timedelta(minutes=10)
"""How long a host waits for the other one, which may be slow: to tell that it hangs is enough."""
_READY = "ready"
_RESULT = "result "


def check_tools() -> None:
    """Refuse where hosts cannot be made.

    Raises:
        ValueError: The user is not root, iproute2 is missing, the system is not Linux, or its
            network settings cannot be written.
    """
    if sys.platform != "linux":
        raise ValueError("benchmarks.two_hosts needs Linux: it makes network namespaces")
    if os.geteuid() != 0:
        raise ValueError("benchmarks.two_hosts needs root, to make network namespaces: use sudo")
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        raise ValueError(
            f"benchmarks.two_hosts needs '{missing[0]}': install iproute2 (ip, tc) and"
            " util-linux (unshare)"
        )
    if not os.access(_CONGESTION_FILE, os.W_OK):
        raise ValueError(
            f"benchmarks.two_hosts needs to write {_CONGESTION_FILE}: run it where"
            " /proc/sys is not read-only, in a container with --privileged"
        )


@contextmanager
def two_hosts(module: str, settings: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """Run `python -m module RANK SETTINGS` on both hosts.

    Yields what host 0 reports, one by one. Both processes are ended when the body is left.
    """
    command = ["unshare", "--net", "--", sys.executable, "-W", "ignore", "-m", module]
    # There are no names to look up in there, which torch would warn of.
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    hosts = [
        subprocess.Popen(
            [*command, str(rank), json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **quiet, **_KEEP_MEMORY},
        )
        for rank in range(len(_ADDRESSES))
    ]
    try:
        for rank, host in enumerate(hosts):
            assert host.stdout is not None
            if host.stdout.readline().strip() != _READY:
                raise RuntimeError(f"host {rank} did not start: see its message above")
        _join(*(host.pid for host in hosts))
        for host in hosts:
            assert host.stdin is not None
            host.stdin.write("go\n")
            host.stdin.flush()
        yield _results(hosts)
    finally:
        for host in hosts:
            if host.poll() is None:
                host.kill()
            host.wait()
            for pipe in (host.stdin, host.stdout):
                assert pipe is not None
                pipe.close()


def _join(first: int, second: int) -> None:
    """Lay the cable: both of its ends are made inside the namespaces."""
    ends = ["name", INTERFACE, "netns", str(first), "type", "veth"]
    _call("ip", "link", "add", *ends, "peer", "name", INTERFACE, "netns", str(second))


def _results(hosts: list[subprocess.Popen[str]]) -> Iterator[dict[str, Any]]:
    assert hosts[0].stdout is not None
    for line in hosts[0].stdout:
        if line.startswith(_RESULT):
            yield json.loads(line.removeprefix(_RESULT))
        else:
            print(line, end="", flush=True)
    codes = [host.wait() for host in hosts]
    if any(codes):
        raise RuntimeError(f"the hosts ended with {codes}: see their messages above")


class Host:
    """One of the two hosts, as the process on it sees it.

    Args:
        rank: Its number, 0 or 1.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        # Nobody else would end us if the benchmark is killed.
        end_with_parent()
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        print(_READY, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("the benchmark has ended before the hosts were joined")
        _CONGESTION_FILE.write_text(_CONGESTION)
        _call("ip", "link", "set", "lo", "up")
        _call("ip", "address", "add", f"{_ADDRESSES[rank]}/24", "dev", INTERFACE)
        _call("ip", "link", "set", INTERFACE, "mtu", str(_MTU), "up")

    def join(self) -> None:
        """Make gloo's process group of both hosts."""
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
        torch.set_num_threads(1)
        store = dist.TCPStore(_ADDRESSES[0], _PORT, is_master=self.rank == 0, timeout=_PATIENCE)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=2, timeout=_PATIENCE
        )

    def limit(self, bits_per_second: float) -> None:
        """Let no more than this leave the host."""
        rate = f"{round(bits_per_second)}bit"
        # Of 1 ms; a queue of 50 ms.
        bucket = f"{max(_BUCKET, round(bits_per_second * 0.001 / 8))}"
        limit = ("rate", rate, "burst", bucket, "latency", "50ms")
        _call("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *limit)

    def report(self, result: Mapping[str, Any]) -> None:
        """Hand a result to the benchmark."""
        if self.rank == 0:
            print(_RESULT + json.dumps(dict(result)), flush=True)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
