"""Settings that every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# What is imported and collected is no garbage, and is not looked through for any, now or later.
gc.disable()

ROOT = Path(__file__).parent
# The machine's cores are shared by several ranks; more threads per rank only fight each other.
torch.set_num_threads(1)
# Megatron marks functions for torch's compiler, which takes a second to load in each of the many
# processes here, and on a CPU longer to compile them than it saves.
if not torch.cuda.is_available():
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

from megatron.core import parallel_state  # noqa: E402  loads the compiler, or does not

import tests.gloo  # noqa: E402, F401  one thread listens for all groups

_LONGEST = ("strategy", "bench", "checkpoint", "docs", "runner", "engine")
"""Folders that begin, so that no worker is left alone with them in the end."""
_TOGETHER = ("docs",)
"""Folders whose files share what is made once."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(f) if (f := _folder(item)) in _LONGEST else 99)
    for item in items:
        folder = _folder(item)
        file = folder if folder in _TOGETHER else item.path.relative_to(ROOT).as_posix()
        item.add_marker(pytest.mark.xdist_group(file))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT).parts[0]


def _leave_nothing() -> Iterator[None]:
    """Trainers of this process leave a process group and its port behind, which processes that a
    later test starts would take for theirs; a test that fails leaves Megatron's groups as well."""
    before, joined = dict(os.environ), dist.is_initialized()
    shared = parallel_state.is_initialized()
    yield
    os.environ.clear()
    os.environ.update(before)
    if parallel_state.is_initialized() and not shared:
        parallel_state.destroy_model_parallel()
    if dist.is_initialized() and not joined:
        dist.destroy_process_group()


# What a module's fixtures leave is for its tests alone, whichever module a worker runs next.
nothing_of_a_module_stays = pytest.fixture(scope="module", autouse=True)(_leave_nothing)
nothing_of_a_test_stays = pytest.fixture(autouse=True)(_leave_nothing)
