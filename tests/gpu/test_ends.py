"""With NCCL no rank stays behind either, whatever the moment at which one is told to end."""

from __future__ import annotations

import pytest
import torch

from tests.strategy.moments import Ended, Job, end
from tests.strategy.test_ends import JOBS, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ON_GPUS = [job._replace(accelerator="gpu") for job in JOBS]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Job, Ended]:
    return dict(end(ON_GPUS, tmp_path_factory.mktemp("moments")))


@pytest.mark.parametrize("job", ON_GPUS, ids=str)
def test_all_ranks_end(ended: dict[Job, Ended], job: Job) -> None:
    check(job, ended[job])
