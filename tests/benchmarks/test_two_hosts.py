"""`benchmarks.two_hosts` in miniature, and that nothing of it stays when it is killed.

Nothing here waits for a number of seconds: a machine that has other things to do is slower.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.two_hosts import hosts
from benchmarks.two_hosts.__main__ import main
from benchmarks.two_hosts.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
MINIATURE = (
    "--rates=[0.5]",
    "--layers=1",
    "--hidden=256",
    "--ffn=512",
    "--length=32",
    "--micro_batch=2",
    "--micro_batches=2",
    "--vocabulary=64",
    "--rounds=1",
)


def _can_make_namespaces() -> bool:
    tools = all(shutil.which(tool) for tool in ("ip", "tc", "unshare"))
    if sys.platform != "linux" or os.geteuid() or not tools:
        return False
    # A container may be root and not be allowed to.
    trial = (
        "ip link add dhellamtest type veth peer name dhellampeer && tc qdisc add dev dhellamtest"
    )
    command = ["unshare", "--net", "sh", "-c", f"{trial} root tbf rate 1mbit burst 9000 latency 1s"]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _can_make_namespaces(), reason="needs root, iproute2, and leave to make network namespaces"
)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.two_hosts", *MINIATURE]
    return subprocess.Popen(
        [*command, "--output", str(folder), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )


def hosts_of(benchmark: int) -> list[int]:
    """Children of a process."""
    children = Path(f"/proc/{benchmark}/task/{benchmark}/children")
    return [int(word) for word in children.read_text().split()] if children.exists() else []


def is_there(process: int) -> bool:
    """Whether it exists and is no zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def until(condition: Callable[[], bool], benchmark: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is so, however long it takes, unless the benchmark has ended before."""
    while not condition():
        assert benchmark is None or benchmark.poll() is None, benchmark.communicate()[1]
        time.sleep(0.05)


def is_joined(process: int) -> bool:
    """Whether the network namespace of a process has the link between the hosts."""
    try:
        return hosts.INTERFACE in Path(f"/proc/{process}/net/dev").read_text()
    except OSError:
        return False


@needs_namespaces
@pytest.mark.timeout(1200)
def test_both_models_compute_the_same_on_two_hosts(tmp_path: Path) -> None:
    benchmark = start(tmp_path)
    out, err = benchmark.communicate()
    assert benchmark.returncode == 0, out + err
    (file,) = tmp_path.glob("two-hosts-*.json")
    found = json.loads(file.read_text())
    rows = {row["side"]: row for row in found["rows"]}
    sides = {"sequential", "megatron", "dhellam", "interleaved", "auto", "megatron-core"}
    assert rows.keys() == sides
    for side in sides - {"megatron-core"}:
        assert rows[side]["parity"] == 0.0, "losses and gradients, bit by bit"
    assert rows["megatron-core"]["parity"] < 1e-6, "the loss of Megatron's own model"
    # A token bucket may let a burst through, but no more than the rate for long.
    assert 0 < rows["auto"]["achieved"] < 0.75
    bound = max(rows["auto"]["compute s"], rows["auto"]["link s"])
    assert rows["auto"]["of bound"] == pytest.approx(bound / rows["auto"]["step s"])
    assert found["CPU"] and str(tmp_path) not in file.read_text()
    assert re.search(r"0.5 Gbit/s: compute .* other processes took \d+% of the processors", out)


@needs_namespaces
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_of_a_benchmark_that_is_killed(how: signal.Signals, tmp_path: Path) -> None:
    benchmark = start(tmp_path, "--rounds=1000")
    try:
        until(lambda: len(hosts_of(benchmark.pid)) == 2, benchmark)
        both = hosts_of(benchmark.pid)
        until(lambda: all(map(is_joined, both)), benchmark)
        assert all(map(is_there, both))
        benchmark.send_signal(how)
        benchmark.wait()
        until(lambda: not any(map(is_there, both)))  # or else hosts outlive the benchmark
    finally:
        benchmark.kill()
        benchmark.communicate()
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    assert hosts.INTERFACE not in links


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sides=[auto]",), "'sequential' must be among them"),
        (("--sides=[sequential,best]",), "'best' is not a side"),
        (("--hidden=100",), "--hidden 100 must be a multiple of 256"),
        (("--ffn=7",), "--ffn 7 must be even"),
        (("--micro_batch=0",), "--micro_batch 0 must be at least 1"),
        (("--rates=[0]",), "each must be more than 0"),
    ],
)
def test_mistakes_are_refused(
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("benchmarks.two_hosts.run.check_tools", lambda: None)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="needs root"):
        hosts.check_tools()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(ValueError, match="needs 'tc': install iproute2"):
        hosts.check_tools()


def test_hosts_are_told_what_the_user_has_typed() -> None:
    settings = Settings(rates=(1.0, 2.5), layers=2, sides=("sequential", "auto"))
    assert Settings.from_json(json.dumps(asdict(settings))) == settings
