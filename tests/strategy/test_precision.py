"""`Trainer(precision=...)`: the types of weights, gradients, master weights and Adam's moments."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_dhellam.parallel.loss_scale import Scaling
from lightning_dhellam.strategy.checks import stuck_average
from lightning_dhellam.strategy.precision import DHellamPrecision
from tests.ranks import run_ranks
from tests.strategy.runs import Model, join, train

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


def _steady(beta: float, dtype: torch.dtype) -> bool:
    """Whether AdamW's average of squares stays somewhere on its way down from a spike."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=0.0, betas=(0.9, beta))
    seen: list[float] = []
    for step in range(1500):
        weight.grad = torch.full_like(weight, 0.0 if step else 10.0)
        optimizer.step()
        seen.append(optimizer.state[weight]["exp_avg_sq"].item())
    return seen[-1] == seen[-2] > seen[0] / 100


@pytest.mark.parametrize("beta", [0.95, 0.99, 0.995, 0.997, 0.999])
def test_averages_that_cannot_fall_are_named(beta: float) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], betas=(0.9, beta))
    said = stuck_average(optimizer, torch.bfloat16)
    assert bool(said) == _steady(beta, torch.bfloat16) == (beta > 0.996)
    assert not said or (f"betas=(0.9, {beta})" in said and "at most 0.995, or precision=" in said)
    assert not stuck_average(optimizer, torch.float32) and not _steady(beta, torch.float32)
    assert not stuck_average(torch.optim.SGD([torch.ones(1)], lr=0.1), torch.bfloat16)


class Calm(Model):
    """AdamW with a second beta that bf16 can follow."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.9, 0.95))


def _warned(rank: int) -> dict[str, bool]:
    join(rank, 1)
    found = {}
    for name, precision, module in (
        ("usual", "bf16-true", Model()),
        ("calm", "bf16-true", Calm()),
        ("master weights", "bf16-mixed", Model()),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train({"micro_batch_size": 2}, module, precision=precision, max_steps=1)
        found[name] = any("may stay where a spike" in str(one.message) for one in caught)
    return found


def test_a_run_in_bf16_alone_is_warned_of_them() -> None:
    (found,) = run_ranks(1, _warned)
    assert found == {"usual": True, "calm": False, "master weights": False}
