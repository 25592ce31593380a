"""The tests of the Triton kernels in Triton's interpreter, where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dhellam.kernels import parity


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs on the GPU itself")
def test_every_triton_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    file = Path(__file__).with_name("test_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout + done.stderr
    assert int(passed[1]) >= 10 * len(parity.CASES), "the file was not collected whole"
