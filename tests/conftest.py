"""Settings that every test shares."""

from __future__ import annotations

import pytest
import torch

# The machine's cores are shared by several ranks; more threads per rank only fight each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
