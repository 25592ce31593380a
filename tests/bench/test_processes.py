"""Processes of benchmarks end with what has started them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lightning_dhellam.bench import processes

# By its path, so that nothing else is imported.
_GOES_ON = f"""
import runpy
runpy.run_path({processes.__file__!r})["end_with_parent"]()
print("goes on")
"""


@pytest.mark.parametrize("known", [True, False])
def test_a_process_ends_if_its_starter_ended_while_it_imported(known: bool) -> None:
    """What is orphaned has another parent than the one that its environment names."""
    named = processes.of_this()
    environment = os.environ | (named if known else dict.fromkeys(named, "0"))
    command = [sys.executable, "-c", _GOES_ON]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == ((0, "goes on\n") if known else (1, ""))
