"""With NCCL no rank stays behind either, whatever the moment at which one is told to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.strategy.moments import Job, end
from tests.strategy.test_ends import JOBS, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_all_ranks_end(job: Job, tmp_path: Path) -> None:
    # One by one, so that several can run side by side: a GPU takes long to start.
    ((_, ended),) = end([job._replace(accelerator="gpu")], tmp_path)
    check(job, ended)
