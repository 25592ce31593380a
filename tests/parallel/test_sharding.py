"""Only an optimizer whose rule looks at each element alone is spread over data-parallel ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.parallel.wrapping import shards
from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE


class WholeMatrices(torch.optim.AdamW):
    """Steps by the gradient over the norm of the whole parameter's."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


class Elementwise(torch.optim.AdamW):
    elementwise = True


class Derived(Elementwise):
    elementwise = False


def _made(kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.ones(2))], lr=0.01)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "possible"),
    [
        (torch.optim.AdamW, True),
        (Elementwise, True),
        (WholeMatrices, False),
        (Derived, False),
        (torch.optim.Adam, False),
    ],
)
def test_who_is_sharded(kind: type[torch.optim.Optimizer], possible: bool) -> None:
    optimizer = _made(kind)
    assert shards(optimizer, None, "bf16-mixed", 2) is possible
    assert not shards(optimizer, None, "bf16-mixed", 1)
    assert not shards(optimizer, None, "bf16-true", 2)
    assert not shards(optimizer, False, "bf16-mixed", 2)
    if possible:
        assert shards(optimizer, True, "bf16-mixed", 2)
    else:
        with pytest.raises(ValueError, match=rf"{kind.__name__} .* elementwise = True"):
            shards(optimizer, True, "bf16-mixed", 2)


def _train(rank: int, world: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    with Runner.create(SHAPE, "cpu") as runner:
        optimizer = runner.optimizer(WholeMatrices(runner.model.parameters(), lr=0.01))
        for _ in range(3):
            tokens = torch.randint(SHAPE.vocab_size, (2, 9), generator=generator)
            own = tokens[rank::world]
            runner.train({"tokens": own[:, :-1], "labels": own[:, 1:]})
            optimizer.step()
        return {name: p.detach().clone() for name, p in runner.model.named_parameters()}


def test_a_rule_of_whole_matrices_gets_whole_matrices() -> None:
    (alone,) = run_ranks(1, _train, 1)
    for weights in run_ranks(2, _train, 2):
        torch.testing.assert_close(weights, alone, rtol=1e-4, atol=1e-6)
