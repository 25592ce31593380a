"""Experts that ranks share are trained, saved and evaluated as those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import Losses, Model, Sequences, evaluation, join, loader, make_trainer

STEPS, STOP = 4, 2
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_ffn_hidden_size": 24,
    "shared_expert_ffn_hidden_size": 16,
    "aux_loss_coefficient": 0.02,
    "z_loss_coefficient": 0.001,
}
TP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"alone": {}, "alone-dhellam": {"plan": "dhellam", "distributed_optimizer": True}},
    2: {"ep2": {"expert_parallel_size": 2}, "tp2": {"tensor_parallel_size": 2}},
    4: {
        "ep2-dp2": {"expert_parallel_size": 2, "plan": "dhellam", "bucket_size": 500},
        "ep4-unsharded": {"expert_parallel_size": 4, "distributed_optimizer": False},
        "tp2-ep2": TP2,
        "tp2-ep2-whole": {**TP2, "expert_tensor_parallel_size": 1, "plan": "megatron"},
        "cp2-ep4": {"context_parallel_size": 2, "expert_parallel_size": 4},
        "pp2-ep2": {"pipeline_parallel_size": 2, "expert_parallel_size": 2},
    },
}
RESUMED = {"32-true": "ep2-dp2", "bf16-mixed": "tp2-ep2"}
"""By precision what is interrupted."""
SAMPLES = 9
"""Of an evaluation; not all ranks have as many."""


class Norms(Callback):
    """Remembers the norm of each step's gradient, before it was clipped."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.values.append(module.grad_norm().item())


def _fit(strategy: dict[str, Any], *callbacks: Callback, **options: Any) -> dict[str, Any]:
    losses, norms = Losses(), Norms()
    resume = options.pop("ckpt_path", None)
    trainer = make_trainer(
        strategy,
        [losses, norms, *callbacks],
        **{"max_steps": STEPS, "gradient_clip_val": 0.5, **options},
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    module = Model(**EXPERTS)
    trainer.fit(module, loader(strategy), ckpt_path=resume)
    weights = ExpertNames(module).all_of({n: p.detach() for n, p in module.named_parameters()})
    (after,) = trainer.validate(module, evaluation(strategy, SAMPLES), verbose=False)
    return {
        "losses": losses.values,
        "norms": norms.values,
        "weights": weights,
        "val_loss": after["val_loss"],
    }


def _resumed(strategy: dict[str, Any], root: Path, precision: Any) -> dict[str, Any]:
    folder = root / precision
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = _fit(strategy, keep, precision=precision)
    path = folder / f"step={STOP}.ckpt"
    return {"straight": straight, "after": _fit(strategy, precision=precision, ckpt_path=path)}


def _of_weights(strategy: dict[str, Any], root: Path) -> dict[str, Any]:
    """What the weights at the end of a run on other ranks do here."""
    path, trainer, module = root / "32-true" / f"step={STEPS}.ckpt", make_trainer(strategy), None
    found = {}
    for loop in ("validate", "test"):
        module = Model(**EXPERTS)
        (logged,) = getattr(trainer, loop)(
            module, evaluation(strategy, SAMPLES), ckpt_path=path, verbose=False
        )
        found |= logged
    (guesses, *_) = trainer.predict(module, evaluation(strategy, 8), ckpt_path=path) or []
    found["guesses"] = guesses
    found["after"] = _fit(strategy, ckpt_path=root / "32-true" / f"step={STOP}.ckpt")
    # Anew, from the weights alone.
    (found["before"],) = trainer.validate(
        module, evaluation(strategy, 8), ckpt_path=path, verbose=False
    )
    losses = Losses()
    anew = make_trainer(strategy, [losses], max_steps=1)
    anew.fit(module, loader(strategy))
    found["anew"] = losses.values
    return found


def _without_a_trainer(rank: int, root: Path) -> dict[str, list[float]]:
    """Losses of a loop of one's own that is interrupted, and of its weights on other ranks."""
    path, found = root / "loop.ckpt", {}
    tokens = Sequences(4 * 2 * STEPS).tokens.view(STEPS, 2, 4, -1)[:, rank]
    batches = [{"tokens": piece[:, :-1], "labels": piece[:, 1:]} for piece in tokens]
    for name, sizes in (
        ("straight", {"expert_parallel_size": 2}),
        ("after", {"expert_parallel_size": 2}),
        ("elsewhere", {}),
    ):
        with Runner.create(
            Model(**EXPERTS).model_config, "cpu", micro_batch_size=3, **sizes
        ) as runner:
            if name == "elsewhere":
                runner.load(path)
                found[name] = [runner.evaluate(batches[0]).item()]
                continue
            optimizer = runner.optimizer(torch.optim.AdamW(runner.model.parameters(), lr=0.01))
            if name == "after":
                runner.load(path)
                found["here"] = [runner.evaluate(batches[0]).item()]
            losses = found[name] = []
            for step in range(runner.steps, STEPS):
                losses.append(runner.mean(runner.train(batches[step])).item())
                optimizer.step()
                if name == "straight" and runner.steps == STOP:
                    runner.save(path)
    return found


def _everything(rank: int, world: int, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if world == 2:
        found["loop"] = _without_a_trainer(rank, root)
    join(rank, world)
    if world == 4:
        found = {p: _resumed(LAYOUTS[4][name], root, p) for p, name in RESUMED.items()}
    else:
        (layout, *_) = LAYOUTS[world].values()
        found["weights"] = _of_weights(layout, root)
    for name, strategy in LAYOUTS[world].items():
        done = found.get("32-true") if name == RESUMED["32-true"] else None
        found[name] = done["straight"] if done else _fit(strategy)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("experts")
    # The others go on from what is saved by four.
    return {world: run_ranks(world, _everything, world, root) for world in (4, 2, 1)}


@pytest.mark.parametrize(
    ("world", "layout"), [(world, name) for world in LAYOUTS for name in LAYOUTS[world]][1:]
)
def test_training_is_that_of_one_process(
    outcomes: dict[int, list[dict[str, Any]]], world: int, layout: str
) -> None:
    expected = outcomes[1][0]["alone"]
    assert len(set(expected["losses"])) == STEPS
    for outcome in outcomes[world]:
        found = outcome[layout]
        for what in ("losses", "norms", "val_loss"):
            torch.testing.assert_close(found[what], expected[what], rtol=1e-5, atol=0, msg=what)
        for name, weight in found["weights"].items():
            whole = expected["weights"][name]
            if weight.shape == whole.shape:
                torch.testing.assert_close(weight, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", RESUMED)
def test_a_restart_goes_on_bitwise(
    outcomes: dict[int, list[dict[str, Any]]], precision: str
) -> None:
    for outcome in outcomes[4]:
        straight, after = (outcome[precision][which] for which in ("straight", "after"))
        assert after["losses"] == straight["losses"][STOP:]
        assert after["norms"] == straight["norms"][STOP:]
        weights: dict[str, Tensor] = straight["weights"]
        assert all(torch.equal(after["weights"][name], weights[name]) for name in weights)


def test_a_loop_of_ones_own_goes_on_bitwise(outcomes: dict[int, list[dict[str, Any]]]) -> None:
    for outcome in outcomes[2]:
        found = outcome["loop"]
        assert len(found["straight"]) == STEPS
        assert found["after"] == found["straight"][STOP:]
        assert found["elsewhere"] == pytest.approx(found["here"], rel=1e-6)


def test_training_goes_on_and_weights_are_used_on_other_ranks(
    outcomes: dict[int, list[dict[str, Any]]],
) -> None:
    saved = outcomes[4][0][RESUMED["32-true"]]["val_loss"]
    for world in (1, 2):
        for outcome in outcomes[world]:
            found = outcome["weights"]
            for name in ("val_loss", "test_loss"):
                assert found[name] == pytest.approx(saved, rel=1e-5)
            assert found["guesses"].shape[1] == evaluation({}).dataset[0]["tokens"].shape[0]
            for what in ("losses", "norms"):
                whole = outcomes[4][0][RESUMED["32-true"]][what][STOP:]
                assert found["after"][what] == pytest.approx(whole, rel=1e-5), what
            assert found["anew"] == pytest.approx([found["before"]["val_loss"]], rel=1e-5)
