"""The job of the guide to Kubernetes, its pods on one machine: one is lost, and it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.docs.pages import ROOT, fences
from tests.strategy.restarted import DEATH, EVERY, STEPS

SOON = "last_call_timeout=3,keep_alive_interval=1"
"""The seconds of torchrun's own that have to pass until it goes on without a node."""


def _of_pods() -> list[str]:
    """What the manifest tells torchrun, but for what it is to run."""
    (shown,) = [
        fence["text"]
        for fence in fences(ROOT / "docs/guides/clusters.md")
        if fence["language"] == "yaml"
    ]
    _, job = yaml.safe_load_all(shown)
    words: list[str] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    return words[: words.index("-m")]


def test_a_job_that_loses_a_node_goes_on_with_those_that_are_left(tmp_path: Path) -> None:
    here = {
        "--nproc-per-node": "1",
        "--rdzv-endpoint": f"127.0.0.1:{find_free_network_port()}",
    }
    words = [w for w in _of_pods() if w.partition("=")[0] not in here]
    words += [f"{name}={value}" for name, value in here.items()]
    assert "--nnodes=1:2" in words and "--max-restarts=10" in words
    script = ["-m", "tests.strategy.restarted", str(tmp_path), "node"]
    pods = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, f"{conf},{SOON}", *script],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # The first is where they meet, as pod 0 is, and has rank 0: the other dies.
        for conf in ("--rdzv-conf=is_host=true", "--rdzv-conf=is_host=false")
    ]
    try:
        said = [pod.communicate(timeout=500)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    ends = sorted(pod.returncode for pod in pods)
    assert ends == [-9, 0], said[0][-3000:]
    assert (tmp_path / "died").exists()
    lives = [sorted(tmp_path.glob(f"{name}-*")) for name in ("straight", "killed")]
    straight, killed = (json.loads(of_name[-1].read_text()) for of_name in lives)
    first, losses = killed
    assert first == DEATH // EVERY * EVERY and len(losses) == STEPS - first
    # Two ranks have made the first steps, one those that follow.
    assert losses == pytest.approx(straight[1][first:], rel=1e-4)
    assert "of the job: going on from" in "".join(said)
