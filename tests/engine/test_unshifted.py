"""Labels that are the tokens at their own places are noticed, and nothing else is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lightning_dhellam.engine.inputs import Limits, unshifted
from lightning_dhellam.engine.intake import Intake
from lightning_dhellam.engine.weights import IGNORED
from lightning_dhellam.parallel import ParallelContext

TEXT = torch.randint(50, (4, 41), generator=torch.Generator().manual_seed(3))
TOKENS, SHIFTED = TEXT[:, :-1], TEXT[:, 1:]


def _padded(labels: torch.Tensor) -> torch.Tensor:
    labels = labels.clone()
    labels[:, 10:] = IGNORED
    return labels


def test_labels_that_were_not_shifted_are_noticed() -> None:
    masked = {"labels": torch.where(torch.arange(40) < 10, TOKENS, SHIFTED)}
    for case in (
        {"labels": TOKENS},
        {"labels": _padded(TOKENS)},
        {**masked, "loss_mask": (torch.arange(40) < 10).float().expand(4, -1)},
    ):
        remark = unshifted({"tokens": TOKENS, **case})
        assert remark is not None and "the label of a token is the token after it" in remark


@pytest.mark.parametrize(
    "labels", [SHIFTED, _padded(SHIFTED), torch.full_like(TOKENS, IGNORED), TOKENS.roll(2, 1)]
)
def test_other_labels_are_not(labels: torch.Tensor) -> None:
    assert unshifted({"tokens": TOKENS, "labels": labels}) is None


def test_one_token_again_and_again_is_its_own_label() -> None:
    same = torch.full((2, 64), 7)
    assert unshifted({"tokens": same, "labels": same}) is None


def _said(own_labels: bool) -> list[str]:
    context = ParallelContext.single(torch.device("cpu"))
    intake = Intake(Limits(50, 40, 1, own_labels), 2, 1, context)
    batch: dict[str, Any] = {"tokens": TOKENS, "labels": TOKENS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        intake.micro_batches({"tokens": TOKENS}, needs_labels=False)
        for _ in range(3):
            intake.micro_batches(batch)
    return [str(warning.message) for warning in caught]


def test_it_is_said_once_and_not_of_labels_of_ones_own_loss() -> None:
    (said,) = _said(own_labels=False)
    assert said.startswith("160 of the 160 labels of the first batch are the tokens at their own")
    assert _said(own_labels=True) == []
