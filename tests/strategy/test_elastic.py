"""The job of the guide to Kubernetes on one machine: a pod is lost or ended, and it goes on."""

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


def _words(processes: int) -> list[str]:
    """The same for pods that are processes of this machine."""
    here = {
        "--nproc-per-node": f"{processes}",
        "--rdzv-endpoint": f"127.0.0.1:{find_free_network_port()}",
    }
    words = [word for word in _of_pods() if word.partition("=")[0] not in here]
    assert "--nnodes=1:2" in words and "--max-restarts=10" in words
    return [*words, *(f"{name}={value}" for name, value in here.items())]


def _pod(words: list[str], conf: str, *script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(*words, f"--rdzv-conf={conf},{SOON}", "-m", "tests.strategy.restarted", *script),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _written(folder: Path, name: str) -> tuple[int, list[float]]:
    """Of the last life: which step was the first, and the losses from it on."""
    first, losses = json.loads(sorted(folder.glob(f"{name}-*"))[-1].read_text())
    return first, losses


def test_a_job_that_loses_a_node_goes_on_with_those_that_are_left(tmp_path: Path) -> None:
    words = _words(1)
    # The first is where they meet, as pod 0 is, and has rank 0: the other dies.
    pods = [_pod(words, f"is_host={host}", str(tmp_path), "node") for host in ("true", "false")]
    try:
        said = [pod.communicate(timeout=500)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, -9], said[0][-3000:]
    assert (tmp_path / "died").exists()
    (_, straight), (first, losses) = (_written(tmp_path, name) for name in ("straight", "killed"))
    assert first == DEATH // EVERY * EVERY and len(losses) == STEPS - first
    # Two ranks have made the first steps, one those that follow.
    assert losses == pytest.approx(straight[first:], rel=1e-4)
    assert "of the job: going on from" in said[0]


def test_a_pod_that_is_told_to_end_saves_and_goes_on_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    """With the exit code after which `OnFailure` starts it."""
    for code in (1, 0):
        pod = _pod(_words(2), "is_host=true", str(tmp_path), "pod")
        try:
            said = pod.communicate(timeout=500)[0]
        finally:
            pod.kill()
        assert pod.returncode == code, said[-3000:]
    (_, straight), (first, losses) = (_written(tmp_path, name) for name in ("straight", "killed"))
    # All ranks have ended at the end of the next step, and saved there.
    assert first > DEATH // EVERY * EVERY and len(losses) == STEPS - first
    assert losses == straight[first:]
