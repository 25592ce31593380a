"""Training in 8 bits on one rank and on two is near fp32: parallel sizes change rounding alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.models import export_huggingface, import_huggingface
from lightning_dhellam.runner import Runner
from tests.engine.harness import batch_of
from tests.models.llama import SMALL, hugging_face_llama, relative_error
from tests.ranks import run_ranks

CONFIG = replace(SMALL, hidden_size=256, ffn_hidden_size=256, num_layers=2)
"""Every rank of two has 128 channels of what they share, as blocks are wide."""
FORMATS = {"current": 0.3, "blockwise": 0.25}
"""Relative error of any gradient, of bf16 besides; two roundings differ by more than each errs."""
SIZES: dict[str, dict[str, int]] = {
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
    "dp": {},
}
Outcome = tuple[Tensor, dict[str, Tensor], float]
"""Losses of two steps, gradients of the first, and the norm of the last."""


def _weights() -> Any:
    """A model that rounding does not throw off its course, with weights of usual size."""
    model = hugging_face_llama(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.15)
    return model


def outcome(
    name: str | None, device: str, sizes: dict[str, int], kernel: str = "reference", **options: Any
) -> Outcome:
    """What this rank finds of two steps."""
    kernels = {"fp8": kernel} if kernel else None
    given = {"micro_batch_size": 1, "precision": "bf16-mixed", "fp8": name, "kernels": kernels}
    with Runner.create(CONFIG, torch.device(device), **sizes, **(given | options)) as runner:
        import_huggingface(runner.model, _weights())
        optimizer = runner.optimizer(
            torch.optim.SGD(runner.model.parameters(), lr=0.05), distributed_optimizer=False
        )
        topology, losses, gradients = runner.context.topology, [], {}
        for step in range(2):
            batch = batch_of(CONFIG, 2, 32)
            own = {n: t.chunk(topology.dp_size)[topology.dp_rank] for n, t in batch.items()}
            losses.append(runner.mean(runner.train(own)))
            norm = optimizer.grad_norm()
            if step == 0:
                found = {n: p.main_grad.clone() for n, p in runner.model.named_parameters()}
                gradients = export_huggingface(runner.model, found)
            optimizer.step()
        return torch.stack(losses).cpu(), {n: t.cpu() for n, t in gradients.items()}, float(norm)


def check(found: Outcome, expected: Outcome, limit: float, where: Any) -> None:
    """Refuse losses and gradients that are farther apart than formats explain."""
    torch.testing.assert_close(found[0], expected[0], rtol=0.01, atol=0.0)
    errors = {n: relative_error(found[1][n].float(), t.float()) for n, t in expected[1].items()}
    assert max(errors.values()) < limit, (where, errors)
    assert abs(found[2] - expected[2]) < limit * expected[2], where


def _outcomes(rank: int) -> dict[tuple[str, str], Outcome]:
    return {
        (name, where): outcome(name, "cpu", sizes)
        for name in FORMATS
        for where, sizes in SIZES.items()
        if name == "current" or where == "tp"
    }


def test_on_one_rank_and_on_two() -> None:
    exact = outcome(None, "cpu", {}, precision="32-true")
    alone = {name: outcome(name, "cpu", {}) for name in FORMATS}
    for name, limit in FORMATS.items():
        check(alone[name], exact, limit, name)
    for outcomes in run_ranks(2, _outcomes):
        for (name, where), found in outcomes.items():
            check(found, alone[name], FORMATS[name], (name, where))
