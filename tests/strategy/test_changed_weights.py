"""Whatever changes the model's weights between steps, training goes on from the changed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.masters import reference
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import Model, evaluation, join, loader, make_trainer

VALUE = 0.5


def _load(model: CausalLM, name: str, new: Tensor) -> None:
    model.load_state_dict({name: new}, strict=False)


def _at_once(model: CausalLM, name: str, new: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(new)


def _behind(model: CausalLM, name: str, new: Tensor) -> None:
    model.get_parameter(name).data.copy_(new)


def _another(model: CausalLM, name: str, new: Tensor) -> None:
    model.get_parameter(name).data = new


def _swap(model: CausalLM, name: str, new: Tensor) -> None:
    model.get_parameter(name).set_(new)  # type: ignore[arg-type]


WAYS = [_load, _at_once, _behind, _another, _swap]
MOMENTS = [
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_end",
]


class Changes(Callback):
    """Gives at each moment some of the parameters a value, once. Keeps what they are in the end.

    Args:
        first: number of the way in which the first parameter is changed; the second has the next.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.left = list(MOMENTS)
        self.found: dict[str, set[float]] = {}
        self.masters: set[float] = set()
        for moment in MOMENTS:
            setattr(self, moment, self._at(moment))

    def _at(self, moment: str) -> Callable[..., None]:
        def change(trainer: Trainer, module: Any, *_: Any) -> None:
            if moment not in self.left:
                return
            self.left.remove(moment)
            parameters = list(enumerate(module.model.named_parameters()))
            for index, (name, weight) in parameters[MOMENTS.index(moment) :: len(MOMENTS)]:
                change_it = WAYS[(index + self.first) % len(WAYS)]
                with torch.no_grad():
                    change_it(module.model, name, torch.full_like(weight, VALUE))

        return change

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        assert self.left == []
        for name, weight in module.model.named_parameters():
            self.found[name] = set(weight.flatten().tolist())
        for stepped in trainer.optimizers[0].state:
            self.masters |= set(stepped.flatten().tolist())


class Still(Model):
    """Every step leaves the weights as they are."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.0)


class Halves(Callback):
    """Has other weights validated than trained, as averages of weights are."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self.kept = [weight.detach().clone() for weight in module.parameters()]
        for weight in module.parameters():
            weight.data.mul_(0.5)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        for weight, kept in zip(module.parameters(), self.kept, strict=True):
            weight.data.copy_(kept)


def _fit(
    strategy: dict[str, Any], module: Model, callback: Callback, precision: str
) -> dict[str, Tensor]:
    trainer = make_trainer(
        {"micro_batch_size": 4, **strategy},
        [callback],
        max_steps=4,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        precision=precision,
    )
    trainer.fit(module, loader(strategy), evaluation(strategy, 8))
    return {name: weight.detach().clone() for name, weight in module.model.named_parameters()}


def _changed(
    rank: int, world: int, runs: list[tuple[dict[str, Any], str]]
) -> list[tuple[str, dict[str, set[float]], set[float]]]:
    join(rank, world)
    found = []
    for first, (strategy, precision) in enumerate(runs):
        changes = Changes(first)
        _fit(strategy, Still(), changes, precision)
        found.append((f"{strategy} {precision} {first}", changes.found, changes.masters))
    return found


RUNS: dict[int, list[tuple[dict[str, Any], str]]] = {
    1: [({}, "bf16-mixed"), ({}, "bf16-mixed"), ({}, "32-true")],
    2: [
        *[({}, "bf16-mixed")] * len(WAYS),
        *[({}, "32-true")] * 2,
        ({"tensor_parallel_size": 2}, "bf16-mixed"),
        ({"pipeline_parallel_size": 2}, "bf16-mixed"),
    ],
}


@pytest.mark.parametrize("world", RUNS)
def test_training_goes_on_from_changed_weights(world: int) -> None:
    for rank in run_ranks(world, _changed, world, RUNS[world]):
        for case, weights, masters in rank:
            wrong = {name: values for name, values in weights.items() if values != {VALUE}}
            assert not wrong, case
            assert masters <= {VALUE, 0.0}, case  # 0: what fills Megatron's buffer up


def _swapped(rank: int, world: int) -> list[bool]:
    join(rank, world)
    plain, swapped = (_fit({}, Model(), c, "bf16-mixed") for c in (Callback(), Halves()))
    return [torch.equal(plain[name], swapped[name]) for name in plain]


@pytest.mark.parametrize("world", [1, 2])
def test_weights_that_come_back_keep_their_low_bits(world: int) -> None:
    for rank in run_ranks(world, _swapped, world):
        assert all(rank)


def test_only_what_rounding_does_not_explain_is_taken_over() -> None:
    master = torch.tensor([1.0, 1.001, -0.0, 3.0, float("nan"), 1e-30, 2.0])
    weight = master.bfloat16()
    before = master.clone()
    reference.take_changes_(master, weight)
    assert torch.equal(master.view(torch.int32), before.view(torch.int32))
    weight[1], weight[5], weight[6] = 2.0, float("inf"), float("nan")
    reference.take_changes_(master, weight)
    expected = torch.tensor([1.0, 2.0, -0.0, 3.0, float("nan"), float("inf"), float("nan")])
    assert torch.equal(master.view(torch.int32), expected.view(torch.int32))


def _replace(model: Any) -> None:
    model.layers[1].mlp.linear_fc1.weight = Parameter(model.layers[1].mlp.linear_fc1.weight.clone())


def _exchange(model: Any) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def _append(model: Any) -> None:
    model.layers.append(torch.nn.Identity())


def _cut(model: Any) -> None:
    weight = model.layers[1].mlp.linear_fc1.weight
    weight.data = weight.data[:8]


def _widen(model: Any) -> None:
    model.final_norm.double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace, "'layers.1.mlp.linear_fc1.weight' was replaced after"),
        (_exchange, "'layers.0' was replaced after"),
        (_append, "'layers.2' was added after"),
        (_cut, r"'layers.1.mlp.linear_fc1.weight' .* shape \(8, 16\), torch.float32 on cpu"),
        (_widen, r"'final_norm.weight' .* torch.float64 on cpu, but was .* torch.float32"),
    ],
)
def test_what_would_not_be_trained_is_refused(change: Callable[..., None], message: str) -> None:
    config = Model().model_config
    model = CausalLM(config, ParallelContext.single(torch.device("cpu")))
    runner = Runner(model)
    try:
        runner.optimizer(torch.optim.AdamW(model.parameters()))
        batch = torch.zeros(1, 8, dtype=torch.long)
        runner.train({"tokens": batch, "labels": batch})
        change(model)
        with pytest.raises(ValueError, match=message):
            runner.train({"tokens": batch, "labels": batch})
    finally:
        runner.close()
