"""Whatever the moment at which a rank is told to end or is killed, no rank stays behind."""

from __future__ import annotations

import re
import signal

import pytest

from tests.strategy.moments import Ended, Job, end

TERM, KILL = signal.SIGTERM, signal.SIGKILL
BEFORE = ("start-up", "connecting", "setup", "fit")
"""Moments at which there is nothing to save yet."""
JOBS = (
    # Who starts the others may have ended before they look for it.
    Job("start-up", TERM, 0),
    Job("start-up", KILL, 1),
    Job("connecting", TERM, 1),
    Job("connecting", KILL, 0),
    Job("setup", TERM, 1),
    Job("setup", KILL, 0),
    Job("fit", TERM, 0),
    Job("fit", KILL, 1),
    Job("training", TERM, 1),
    Job("training", KILL, 0),
    Job("batch 0", TERM, 0),
    Job("gradients 0", KILL, 0),
    Job("gradients 1", TERM, 1),
    Job("batch 5", KILL, 1),
    Job("validation", TERM, 0),
    Job("validation", KILL, 1),
    Job("saving", TERM, 1),
    Job("saving", KILL, 0),
    Job("profile", TERM, 1),
    Job("profile", KILL, 0),
    Job("solve", TERM, 0),
    Job("solve", TERM, 1),
    Job("solve", KILL, 1),
    Job("walk", KILL, 0, schedule="zb-v"),
    Job("walk", KILL, 1, schedule="1f1b"),
    Job("walk", KILL, 0, schedule="interleaved-1f1b"),
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, Ended]:
    return dict(end(JOBS, tmp_path_factory.mktemp("moments")))


def check(job: Job, ended: Ended) -> None:
    """All processes have ended, by themselves and at one step where there was something to save."""
    assert f"rank {job.victim}: {job}" in ended.output
    assert ended.gone, ended.output
    if job.signum == TERM and job.moment not in BEFORE:
        for rank in (0, 1):
            assert f"rank {rank} ends by SIGTERMException" in ended.output
        steps = re.findall(r"rank \d ends after (\d+) steps", ended.output)
        assert len(steps) == 2 and len(set(steps)) == 1, ended.output
        said = f"[rank {job.victim}] SIGTERM: all ranks end at their next step"
        assert said in ended.output


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_all_ranks_end(ended: dict[Job, Ended], job: Job) -> None:
    check(job, ended[job])
