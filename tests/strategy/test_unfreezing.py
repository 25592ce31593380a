"""Parameters that are frozen and unfrozen during training are trained as by plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Model, join, loader, make_trainer

STEPS = 6
LATE = ("layers.0.", "embedding", "layers.1.mlp.linear_fc2")
"""What is frozen at first, and trained from step 2 on."""
EARLY = ("layers.1.self_attention", "final_norm")
"""What is trained at first, frozen in steps 3 and 4, and trained again."""


def set_trained(model: Any, names: tuple[str, ...], trained: bool) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith(names):
            parameter.requires_grad_(trained)


class Gradual(Model):
    """Freezes and unfreezes its parameters, all of which the optimizer has from the beginning."""

    def build_model(self, context: Any, dtype: Any) -> Any:
        model = super().build_model(context, dtype)
        set_trained(model, LATE, False)
        return model

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step == 2:
            set_trained(self.model, LATE, True)
        if step in (3, 5):
            set_trained(self.model, EARLY, step == 5)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "lr": 0.02}]
        return torch.optim.AdamW(groups, lr=0.01)


class Watch(Callback):
    """The names of what each step has changed."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.weights = self._now(module)

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        now = self._now(module)
        self.changed.append({n for n in now if not torch.equal(now[n], self.weights[n])})
        self.weights = now

    @staticmethod
    def _now(module: Any) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in module.model.named_parameters()}


class Thaw(BaseFinetuning):
    """Lightning's own way: another group of the optimizer from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        if pl_module.model.embedding is not None:
            self.freeze(pl_module.model.embedding)
        self.freeze(pl_module.model.layers[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1 and any(True for _ in pl_module.model.layers[0].parameters()):
            self.unfreeze_and_add_param_group(pl_module.model.layers[0], optimizer, lr=0.02)


class Trained(Model):
    """Gives the optimizer what is trained at first."""

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01)


Found = tuple[list[set[str]], dict[str, Tensor]]


def _fit(strategy: Any, precision: str) -> list[Found]:
    found: list[Found] = []
    runs: list[tuple[Any, list[Callback]]] = [(Gradual(), []), (Trained(), [Thaw()])]
    for module, callbacks in runs:
        watch = Watch()
        trainer = make_trainer(
            strategy,
            [*callbacks, watch],
            max_steps=STEPS,
            max_epochs=-1,
            limit_train_batches=STEPS // 2,
            precision=precision,
            gradient_clip_val=1.0,
        )
        trainer.fit(module, loader(strategy))
        found.append((watch.changed, watch.weights))
    return found


def _all(rank: int, world: int, runs: list[tuple[Any, str]]) -> list[list[Found]]:
    join(rank, world)
    return [_fit(strategy, precision) for strategy, precision in runs]


WHOLE = {"distributed_optimizer": False}
RUNS: dict[int, list[tuple[Any, str]]] = {
    1: [({"micro_batch_size": 3}, "32-true"), ({}, "bf16-mixed")],
    2: [
        ({}, "32-true"),
        (WHOLE, "32-true"),
        ({"tensor_parallel_size": 2}, "32-true"),
        ({"pipeline_parallel_size": 2}, "32-true"),
        ({}, "bf16-mixed"),
        (WHOLE, "bf16-mixed"),
    ],
}


@pytest.fixture(scope="module")
def plain() -> list[Found]:
    return run_ranks(1, _all, 1, [("auto", "32-true")])[0][0]


@pytest.mark.parametrize("world", RUNS)
def test_freezing_is_followed_from_the_next_step_on(world: int, plain: list[Found]) -> None:
    for rank in run_ranks(world, _all, world, RUNS[world], timeout=600):
        for (sizes, precision), runs in zip(RUNS[world], rank, strict=True):
            for (changed, weights), (expected, whole) in zip(runs, plain, strict=True):
                case = f"{sizes} {precision}"
                assert changed == [names & weights.keys() for names in expected], case
                for name, weight in weights.items():
                    if weight.shape == whole[name].shape and precision == "32-true":
                        torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4)


class Tied(Gradual):
    """Freezes a weight that two stages share, trains it, and freezes it again."""

    def __init__(self) -> None:
        super().__init__(tie_embeddings=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.trainer.global_step in (4, 5):
            set_trained(self.model, ("embedding",), self.trainer.global_step == 5)


def _tied(rank: int, world: int, strategies: list[Any]) -> list[tuple[Found, bool | None]]:
    join(rank, world)
    found = []
    for strategy in strategies:
        module, watch = Tied(), Watch()
        trainer = make_trainer(strategy, [watch], max_steps=7, max_epochs=-1)
        trainer.fit(module, loader(strategy))
        copy = module.model.tied_copy
        trained = None if copy is None else copy.requires_grad
        found.append(((watch.changed, watch.weights), trained))
    return found


def test_a_weight_that_stages_share_is_followed_by_both() -> None:
    ((plain, _),) = run_ranks(1, _tied, 1, ["auto"])[0]
    sizes = {"pipeline_parallel_size": 2}
    strategies = [{**sizes, "schedule": name} for name in ("1f1b", "zb-v")]
    expected, whole = plain
    assert ["embedding.word_embeddings.weight" in names for names in expected] == [
        False, False, True, True, False, True, True
    ]  # fmt: skip
    ranks = run_ranks(2, _tied, 2, strategies, timeout=300)
    assert [trained for _, trained in ranks[1]] == [True, None]
    for rank in ranks:
        for (changed, weights), _ in rank:
            assert changed == [names & weights.keys() for names in expected]
            for name, weight in weights.items():
                torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4)


class Resumed(Gradual):
    """Goes on from step 4."""

    def on_fit_start(self) -> None:
        set_trained(self.model, LATE, True)

    def on_train_start(self) -> None:
        set_trained(self.model, EARLY, False)


def _resume(rank: int, world: int, folder: str) -> tuple[bool, str]:
    join(rank, world)
    path, weights = f"{folder}/four.ckpt", []
    for module, steps, start in ((Gradual(), 4, None), (Resumed(), STEPS, path)):
        trainer = make_trainer({}, max_steps=steps, precision="bf16-mixed")
        trainer.fit(module, loader({}), ckpt_path=start)
        if start is None:
            trainer.save_checkpoint(path)
    weights = [p.detach().clone() for p in module.parameters()]
    whole = Gradual()
    make_trainer({}, max_steps=STEPS, precision="bf16-mixed").fit(whole, loader({}))
    same = all(map(torch.equal, weights, whole.parameters()))
    trainer = make_trainer({}, max_steps=STEPS, precision="bf16-mixed")
    with pytest.raises(ValueError) as refused:
        trainer.fit(Gradual(), loader({}), ckpt_path=path)
    return same, str(refused.value)


def test_a_resumed_run_unfreezes_what_was_trained(tmp_path: Any) -> None:
    for same, refused in run_ranks(2, _resume, 2, str(tmp_path)):
        assert same
        assert "has not been trained in this run" in refused


def _lone(rank: int, world: int, where: str) -> str:
    with Runner.create(SHAPE, "cpu") as runner:
        optimizer = torch.optim.AdamW(
            p for n, p in runner.model.named_parameters() if "layers.0" not in n
        )
        set_trained(runner.model, ("layers.0.",), False)
        stepping = runner.optimizer(optimizer)
        batch = torch.zeros(1, 8, dtype=torch.long)
        runner.train({"tokens": batch, "labels": batch})
        stepping.step()
        if where == "optimizer":
            set_trained(runner.model, ("layers.0.",), True)
        elif where == "ranks":
            set_trained(runner.model, (f"layers.{rank}.", "final_norm"), False)
        elif rank == 1 and where == "one":
            set_trained(runner.model, ("layers.1.mlp",), False)
        elif rank == 1:
            frozen = [p for n, p in runner.model.named_parameters() if "layers.0" in n]
            optimizer.add_param_group({"params": frozen})
        if where in ("one", "one-group"):
            # The others hear of it in the next step, so that none has to wait in this one.
            runner.train({"tokens": batch, "labels": batch})
            stepping.step()
        with pytest.raises(ValueError) as refused:
            runner.train({"tokens": batch, "labels": batch})
        return str(refused.value)


def test_what_cannot_be_trained_is_refused() -> None:
    for said in run_ranks(2, _lone, 2, "optimizer"):
        assert "'model.layers.0." in said and "add_param_group" in said
    for said in run_ranks(2, _lone, 2, "ranks"):
        assert "'layers.1." in said and "frozen on some ranks only" in said
    for said in run_ranks(2, _lone, 2, "one", timeout=60):
        assert "'layers.1.mlp." in said and "frozen on some ranks only" in said
    for said in run_ranks(2, _lone, 2, "one-group", timeout=60):
        assert "optimizer's groups" in said and "on rank 1 only" in said
