"""Blocks of the user's own: tensor parallelism changes neither loss nor gradients.

What a block is given depends on what it declares (`lightning_dhellam.layers.sequence`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import (
    CPU,
    add_main_grads,
    batch_of,
    differing,
    engine_of,
    pieces,
    prepared,
    reduced,
    train,
)
from tests.models.llama import SMALL, relative_error
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

CONFIG = replace(SMALL, num_layers=2)
WIDTH, INNER = CONFIG.hidden_size, 24
Outcome = tuple[Tensor, dict[str, Tensor]]


class Convolution(nn.Module):
    """Causal, of width 3, for each channel; with dropout."""

    def __init__(self, p: float = 0.0, width: int = WIDTH) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(width, width, 3, groups=width)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x.permute(1, 2, 0), (2, 0))
        return x + self.dropout(self.kernel(padded)).permute(2, 0, 1)


class Perceptron(nn.Module):
    """A norm and Megatron's parallel linear layers, with biases."""

    def __init__(self, config: Any, group: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm = nn.LayerNorm(width)
        kinds = {"config": config, "init_method": nn.init.xavier_normal_, "tp_group": group}
        self.up = ColumnParallelLinear(width, INNER, bias=True, **kinds)
        self.down = RowParallelLinear(
            INNER, width, bias=True, input_is_parallel=True, skip_bias_add=False, **kinds
        )
        for bias in (self.up.bias, self.down.bias):
            bias.data.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        inner, _ = self.up(self.norm(x))
        return x + self.down(nn.functional.gelu(inner))[0]


class TokenWisePerceptron(Perceptron):
    """Is given each rank's own tokens, which its linear layers gather."""

    token_wise = True


class Gate(nn.Module):
    """Token by token, as it says."""

    token_wise = True

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.scale)


def _unsplit(model: CausalLM) -> Any:
    """The configuration of layers that take the whole sequence."""
    return replace(model.transformer_config, sequence_parallel=False)


BLOCKS: dict[str, Callable[[CausalLM], nn.Module]] = {
    "convolution": lambda model: Convolution(),
    "convolution with dropout": lambda model: Convolution(0.3),
    "parallel layers": lambda m: Perceptron(m.transformer_config, m.context.groups.tp),
    "parallel layers of the whole": lambda m: Perceptron(_unsplit(m), m.context.groups.tp),
    "parallel layers of own tokens": lambda m: TokenWisePerceptron(
        m.transformer_config, m.context.groups.tp
    ),
    "both": lambda m: nn.Sequential(
        Convolution(), Perceptron(m.transformer_config, m.context.groups.tp)
    ),
    "gate": lambda model: Gate(),
}


def _with_block(context: ParallelContext, name: str) -> CausalLM:
    """The block between two transformer layers."""
    model = prepared(CONFIG, context)
    with context.megatron(), torch.random.fork_rng():
        torch.manual_seed(5)
        model.layers.insert(1, BLOCKS[name](model))
    add_main_grads(model)
    return model


def _outcome(context: ParallelContext, name: str) -> Outcome:
    model = _with_block(context, name)
    engine = engine_of(lower(model), poison=True)
    loss, gradients = train(engine, model, pieces(batch_of(CONFIG, 3, 16), 2, context))
    return loss, reduced(model, gradients)


def _reference(context: ParallelContext, name: str) -> Tensor:
    """Losses of every token by Megatron's modules, without graphs."""
    model, batch = _with_block(context, name).eval(), batch_of(CONFIG, 3, 16)
    with torch.no_grad():
        return model(batch["tokens"], batch["labels"])


def _plans_that_differ(context: ParallelContext, name: str) -> list[str]:
    model = _with_block(context, name)
    lowered, micro_batches = lower(model), pieces(batch_of(CONFIG, 3, 8), 1, context)
    expected = train(engine_of(lowered, builder=BUILDERS["sequential"]), model, micro_batches)
    builders = (*BUILDERS.values(), *map(random_builder, range(4)))
    outcomes = (
        train(engine_of(lowered, builder=builder, poison=True), model, micro_batches)
        for builder in builders
    )
    return [name for outcome in outcomes for name in differing(outcome, expected)]


def _own_tokens_of_whole_layers(context: ParallelContext) -> str:
    model = prepared(CONFIG, context)
    with context.megatron():
        model.layers.insert(1, TokenWisePerceptron(_unsplit(model), context.groups.tp))
    with pytest.raises(ValueError) as error:
        lower(model)
    return str(error.value)


def _on_rank(rank: int) -> dict[str, Any]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    return {
        "outcomes": {name: _outcome(context, name) for name in BLOCKS},
        "reference": {name: _reference(context, name) for name in BLOCKS},
        "plans": [
            _plans_that_differ(context, name) for name in ("convolution with dropout", "both")
        ],
        "refused": _own_tokens_of_whole_layers(context),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, _on_rank)


@pytest.fixture
def context() -> ParallelContext:
    return ParallelContext.single(CPU)


def split_along(name: str) -> int | None:
    """Which dimension of a parameter's gradient two ranks share."""
    return {"up.weight": 0, "up.bias": 0, "down.weight": 1}.get(".".join(name.split(".")[-2:]))


@pytest.mark.parametrize("name", BLOCKS)
def test_two_tensor_ranks_are_as_one(
    name: str, context: ParallelContext, two_ranks: list[dict[str, Any]]
) -> None:
    loss, gradients = _outcome(context, name)
    outcomes = [outcome["outcomes"][name] for outcome in two_ranks]
    for other, _ in outcomes:
        assert abs(other - loss) <= 1e-6 * loss
    norms = {"layers.0.input_layernorm.weight", "layers.2.input_layernorm.weight"}
    own = {parameter for parameter in gradients if parameter.startswith("layers.1.")}
    assert own and norms < gradients.keys()
    for parameter in own | norms:
        parts = [gradients_of_rank[parameter] for _, gradients_of_rank in outcomes]
        axis = split_along(parameter)
        if axis is None:
            assert torch.equal(*parts), f"{parameter} differs between the ranks"
        found = parts[0] if axis is None else torch.cat(parts, axis)
        assert relative_error(found, gradients[parameter]) <= 1e-5, parameter


@pytest.mark.parametrize("name", BLOCKS)
def test_the_model_itself_computes_the_same_on_two_ranks(
    name: str, context: ParallelContext, two_ranks: list[dict[str, Any]]
) -> None:
    expected = _reference(context, name)
    for outcome in two_ranks:
        assert relative_error(outcome["reference"][name], expected) <= 1e-5


def test_no_plan_changes_a_block_of_whole_sequences(two_ranks: list[dict[str, Any]]) -> None:
    assert [outcome["plans"] for outcome in two_ranks] == [[[], []], [[], []]]


def test_layers_of_whole_sequences_in_a_token_wise_block_are_refused(
    two_ranks: list[dict[str, Any]],
) -> None:
    assert {outcome["refused"] for outcome in two_ranks} == {
        "layer 1, a TokenWisePerceptron, has token_wise = True, so it is given each rank's own"
        " tokens, but its 'up', a ColumnParallelLinear, takes the whole sequence: build it with"
        " sequence_parallel=True, or leave token_wise out"
    }


class Shrinking(nn.Module):
    """Returns fewer tokens than it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return x[1:]


def test_a_block_that_changes_the_shape_is_refused(context: ParallelContext) -> None:
    model = prepared(CONFIG, context)
    model.layers.insert(1, Shrinking())
    with pytest.raises(ValueError) as error:
        engine_of(lower(model)).evaluate(pieces(batch_of(CONFIG, 2, 8), 2, context))
    assert str(error.value) == (
        f"layer 1, a Shrinking, made (7, 2, {WIDTH}) in torch.float32 of hidden states"
        f" (8, 2, {WIDTH}) in torch.float32: a block must return hidden states of that shape and"
        " type"
    )
