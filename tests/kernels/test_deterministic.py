"""Torch's switch for deterministic algorithms, for a while."""

from __future__ import annotations

import os

import pytest
import torch

from lightning_dhellam.kernels.deterministic import deterministic, prepare


@pytest.mark.parametrize("strict", [True, False])
def test_the_switch_is_as_it_was_afterwards(strict: bool) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), deterministic(strict=strict):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is not strict
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_what_is_never_written_is_no_number() -> None:
    with deterministic():
        assert torch.empty(3).isnan().all()


def test_what_the_user_has_set_for_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
