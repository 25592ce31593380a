"""What is trained is the order of `model.layers`, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.strategy.runs import Model, join, train


class Arranged(Model):
    """Its layers are put into another order, or one of them into two places."""

    def __init__(self, arrangement: tuple[int, ...]) -> None:
        super().__init__(num_layers=5)
        self.arrangement = arrangement

    def build_model(self, context: Any, dtype: Any) -> Any:
        model = super().build_model(context, dtype)
        layers = list(model.layers)
        model.layers = torch.nn.ModuleList(layers[number] for number in self.arrangement)
        return model


AS_BUILT, EXCHANGED = (0, 1, 2, 3, 4), (1, 0, 2, 3, 4)
SHARED, ACROSS, SHARED_PARTS = (0, 1, 2, 0, 4), (3, 1, 2, 0, 4), (0, 0, 1, 2, 3)
PP = {"pipeline_parallel_size": 2, "pipeline_split": [2, 1, 1, 1]}
RUNS: dict[int, list[tuple[Any, tuple[int, ...]]]] = {
    1: [({}, EXCHANGED), ({}, SHARED), ({}, ACROSS)],
    2: [({}, SHARED), ({"tensor_parallel_size": 2}, SHARED), (PP, EXCHANGED)],
}


def _train(rank: int, world: int, runs: list[tuple[Any, tuple[int, ...]]]) -> list[list[float]]:
    join(rank, world)
    return [train(strategy, Arranged(arrangement)) for strategy, arrangement in runs]


def test_layers_are_trained_in_their_order() -> None:
    arrangements = (AS_BUILT, EXCHANGED, SHARED, ACROSS)
    plain = [("auto", arrangement) for arrangement in arrangements]
    (losses,) = run_ranks(1, _train, 1, plain)
    expected = dict(zip(arrangements, losses, strict=True))
    assert len({tuple(run) for run in losses}) == len(arrangements)
    for world, runs in RUNS.items():
        for rank in run_ranks(world, _train, world, runs):
            for (_, arrangement), found in zip(runs, rank, strict=True):
                torch.testing.assert_close(found, expected[arrangement], rtol=1e-4, atol=0)


def _refused(rank: int, world: int) -> list[str]:
    join(rank, world)
    said = []
    for arrangement in (ACROSS, SHARED, SHARED_PARTS):
        with pytest.raises(ValueError) as refused:
            train(PP, Arranged(arrangement))
        said.append(str(refused.value))
    return said


def test_what_a_pipeline_cannot_train_is_refused_on_all_ranks() -> None:
    for across, shared, parts in run_ranks(2, _refused, 2):
        assert "model.layers[1] was built for chunk 0" in across and "chunk 2" in across
        assert "model.layers[3] is model.layers[0] once more" in shared
        assert "model.layers[1] is model.layers[0] once more" in parts
