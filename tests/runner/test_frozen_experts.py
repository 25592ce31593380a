"""Experts that are frozen and unfrozen by their numbers among all train as in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of
from tests.models.mixtures import MIXTURES
from tests.ranks import run_ranks

CONFIG = replace(MIXTURES["mixtral"], aux_loss_coefficient=0.02)
SAMPLES, LENGTH = 4, 16
FROZEN: tuple[tuple[int, ...], ...] = ((3,), (2, 3), (), (0, 2), (0, 1, 2, 3), (1,))
"""The experts that are frozen in each step. Of four, two ranks hold (0, 1) and (2, 3)."""
RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"distributed_optimizer": False},
    {"precision": "bf16-mixed"},
)


def _freeze(runner: Runner, experts: tuple[int, ...]) -> None:
    inside = tuple(f".local_experts.{number}." for number in experts)
    for name, parameter in runner.model.named_among_all():
        parameter.requires_grad_(not any(part in name for part in inside))


def _run(rank: int, *, shared: bool, precision: str = "32-true", **options: Any) -> dict[str, Any]:
    """Losses, what each step has changed, and the weights in the end, by names among all."""
    sizes = {"expert_parallel_size": 2} if shared else {}
    found: dict[str, Any] = {"losses": [], "changed": []}
    with Runner.create(CONFIG, CPU, micro_batch_size=1, precision=precision, **sizes) as runner:
        names, batch = ExpertNames(runner.model), batch_of(CONFIG, SAMPLES, LENGTH)
        if shared:
            batch = {key: value.chunk(2)[rank] for key, value in batch.items()}
        optimizer = torch.optim.AdamW(runner.model.parameters(), lr=0.01)
        _freeze(runner, FROZEN[0])
        stepping = runner.optimizer(optimizer, **options)
        for frozen in FROZEN:
            _freeze(runner, frozen)
            before = {n: p.detach().clone() for n, p in runner.model.named_parameters()}
            found["losses"].append(runner.mean(runner.train(batch)).item())
            stepping.step()
            found["weights"] = names.all_of(
                {n: p.detach() for n, p in runner.model.named_parameters()}
            )
            old = names.all_of(before)
            changed = {n for n, p in found["weights"].items() if not torch.equal(p, old[n])}
            found["changed"].append(changed)
    return found


def _refusals(rank: int) -> dict[str, str]:
    """What is said of a change by some of the ranks that hold an expert, or of a lacking one."""
    said = {}
    for where in ("before", "between", "lacking"):
        sizes = {"expert_parallel_size": 2} if where == "lacking" else {}
        with Runner.create(CONFIG, CPU, micro_batch_size=1, **sizes) as runner:
            batch = batch_of(CONFIG, 2, LENGTH)
            if where == "before" and rank == 1:
                _freeze(runner, (1,))
            if where == "lacking":
                _freeze(runner, (3,))
            trained = [p for p in runner.model.parameters() if p.requires_grad]
            try:
                stepping = runner.optimizer(torch.optim.AdamW(trained, lr=0.01))
                runner.train(batch)
                stepping.step()
                _freeze(runner, (0,) if where == "between" and rank == 1 else ())
                for _ in range(2):
                    runner.train(batch)
                    stepping.step()
            except ValueError as error:
                said[where] = str(error)
    return said


def _all(rank: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    return [_run(rank, shared=True, **options) for options in RUNS], _refusals(rank)


@pytest.fixture(scope="module")
def ranks() -> list[tuple[list[dict[str, Any]], dict[str, str]]]:
    return run_ranks(2, _all, timeout=600)


def test_experts_frozen_on_one_rank_train_as_in_one_process(ranks: Any) -> None:
    for number, options in enumerate(RUNS):
        alone = _run(0, shared=False, **options)
        together: dict[str, Tensor] = {}
        for found, _ in ranks:
            run = found[number]
            exact = "precision" not in options
            torch.testing.assert_close(
                run["losses"], alone["losses"], rtol=1e-5 if exact else 1e-2, atol=0
            )
            for step, (changed, expected) in enumerate(
                zip(run["changed"], alone["changed"], strict=True)
            ):
                assert changed == expected & run["weights"].keys(), (options, step)
            together |= run["weights"]
        assert together.keys() == alone["weights"].keys()
        if exact:
            torch.testing.assert_close(together, alone["weights"], rtol=1e-3, atol=1e-4)


def test_what_only_some_holders_change_is_refused_on_all_ranks(ranks: Any) -> None:
    for _, said in ranks:
        assert "local_experts.1." in said["before"] and "some ranks only" in said["before"]
        assert "local_experts.0." in said["between"] and "some ranks only" in said["between"]
        assert "local_experts.3." in said["lacking"] and "add_param_group" in said["lacking"]
