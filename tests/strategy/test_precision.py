"""`Trainer(precision=...)`: the types of weights, gradients, master weights and Adam's moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_dhellam.parallel.loss_scale import Scaling
from lightning_dhellam.strategy.precision import DHellamPrecision
from tests.ranks import run_ranks
from tests.strategy.runs import join, train

# Weights, main_grad, what the optimizer steps.
TYPES = {
    "32-true": (torch.float32, torch.float32, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.float32, torch.float32),
    "16-mixed": (torch.float16, torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
}
Outcome = tuple[dict[str, set[torch.dtype]], list[float]]


class Types(Callback):
    """The types found at the end of training."""

    def __init__(self) -> None:
        self.found: dict[str, set[torch.dtype]] = {}

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        optimizer = trainer.optimizers[0]
        stepped = optimizer.state  # outside of a step the groups hold the model's parameters
        self.found = {
            "weights": {p.dtype for p in module.model.parameters()},
            "gradients": {p.main_grad.dtype for p in module.model.parameters()},
            "stepped": {p.dtype for p in stepped},
            "moments": {state["exp_avg"].dtype for state in optimizer.state.values()},
        }


def _flags(precision: str) -> dict[str, Any]:
    if precision != "16-mixed":
        return {"precision": precision}
    # On CPUs Lightning takes the flag for bf16-mixed.
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def _train(rank: int, world: int, strategies: list[dict[str, Any]]) -> dict[str, list[Outcome]]:
    join(rank, world)
    outcomes: dict[str, list[Outcome]] = {precision: [] for precision in TYPES}
    for precision, found in outcomes.items():
        for strategy in strategies:
            types = Types()
            losses = train(strategy, callbacks=[types], **_flags(precision))
            found.append((types.found, losses))
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    (alone,) = run_ranks(1, _train, 1, [{"micro_batch_size": 2}])
    pair = run_ranks(2, _train, 2, [{}, {"tensor_parallel_size": 2}])[0]
    return {precision: alone[precision] + pair[precision] for precision in TYPES}


@pytest.mark.parametrize("precision", TYPES)
def test_types(outcomes: dict[str, list[Outcome]], precision: str) -> None:
    weights, gradients, stepped = TYPES[precision]
    for found, _ in outcomes[precision]:
        assert found == {
            "weights": {weights},
            "gradients": {gradients},
            "stepped": {stepped},
            "moments": {stepped},
        }


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_sixteen_bits_follow_thirty_two(outcomes: dict[str, list[Outcome]], precision: str) -> None:
    exact = outcomes["32-true"][0][1]
    for _, losses in outcomes[precision]:
        assert losses != exact
        # bf16 keeps 8 bits: 2**-8 of each of a few dozen roundings, in part cancelling.
        torch.testing.assert_close(losses, exact, rtol=0.01, atol=0)


def test_a_scaler_of_the_users_is_followed_or_refused() -> None:
    numbers = {"init_scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25}
    scaler = torch.amp.GradScaler("cpu", growth_interval=7, **numbers)
    ours = DHellamPrecision.of(MixedPrecision("16-mixed", "cpu", scaler))
    assert ours.scaling == Scaling(8.0, 4.0, 0.25, 7)
    with pytest.raises(ValueError, match="the scaler is not enabled"):
        off = torch.amp.GradScaler("cpu", enabled=False)
        DHellamPrecision.of(MixedPrecision("16-mixed", "cpu", off))
    with pytest.raises(ValueError, match="ShardedGradScaler does not work with DHellamStrategy"):
        sharded = ShardedGradScaler("cpu")
        DHellamPrecision.of(MixedPrecision("16-mixed", "cpu", sharded))
