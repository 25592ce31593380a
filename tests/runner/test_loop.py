"""A loop of one's own around `Runner`, as its documentation shows it, is a Trainer's to the bit."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state
from torch import Tensor

from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Losses, Model, join, loader, make_trainer

CONFIG = replace(SHAPE, hidden_dropout=0.1)
STEPS = 4
Run = tuple[list[float], dict[str, Tensor]]
"""The loss of each step, and this rank's weights in the end."""


def documented() -> str:
    """The loop in the documentation of `Runner`."""
    paragraphs = inspect.cleandoc(Runner.__doc__ or "").split("\n\n")
    code = next(part for part in paragraphs if part.startswith("    with Runner.create("))
    return textwrap.dedent(code)


def looped(path: Path, last: int, batches: list[Any], options: dict[str, Any]) -> Run:
    """Run the documented loop up to step `last`; it goes on from `path` if that is there."""
    losses: list[Tensor] = []
    names = {
        "torch": torch,
        "Runner": Runner,
        "config": CONFIG,
        "sizes": options,
        "batches": batches,
        "path": path,
        "last": last,
        "losses": losses,
    }
    exec(compile(documented(), "documentation of Runner", "exec"), names)
    model: CausalLM = names["runner"].model  # type: ignore[attr-defined]
    return [loss.item() for loss in losses], weights_of(model)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if value is not None}


class Weights(Callback):
    """This rank's weights in the end."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self.found = weights_of(module.model)


def trained(options: dict[str, Any], last: int = STEPS, save: Path | None = None) -> Run:
    """The same by a Trainer, which may save a checkpoint in the end."""
    strategy = {"micro_batch_size": 3, **options}
    precision = strategy.pop("precision", "32-true")
    losses, weights = Losses(), Weights()
    trainer = make_trainer(
        strategy,
        [losses, weights],
        max_steps=last,
        precision=precision,
        gradient_clip_val=1.0,
    )
    trainer.fit(Model(hidden_dropout=CONFIG.hidden_dropout), loader(strategy))
    if save is not None:
        trainer.save_checkpoint(save)
    return losses.values, weights.found


def both(rank: int, world: int, folder: Path, options: dict[str, Any]) -> dict[str, Run]:
    """The runs of a rank: by a Trainer, by the loop, by the loop in two parts and by both."""
    join(rank, world)
    batches = list(loader({k: v for k, v in options.items() if k != "precision"}))
    found = {
        "trainer": trained(options),
        "loop": looped(folder / "whole", STEPS, batches, options),
        "first part": looped(folder / "parts", 2, batches, options),
        "second part": looped(folder / "parts", STEPS, batches, options),
    }
    trained(options, 2, folder / "trainer.ckpt")
    found["from a Trainer"] = looped(folder / "trainer.ckpt", STEPS, batches, options)
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "alone-bf16": (1, {"precision": "bf16-mixed", "plan": "dhellam"}),
    "tp2": (2, {"tensor_parallel_size": 2}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "dp2": (2, {"plan": "sequential"}),
    "dp2-bf16": (2, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_documented_loop_does_what_a_trainer_does(layout: str, tmp_path: Path) -> None:
    world, options = LAYOUTS[layout]
    for found in run_ranks(world, both, world, tmp_path, options, timeout=600):
        losses, weights = found["trainer"]
        assert len(set(losses)) == STEPS
        assert found["first part"][0] == losses[:2]
        for name in ("loop", "second part", "from a Trainer"):
            own, last = found[name]
            assert own == (losses if name == "loop" else losses[2:]), name
            assert last.keys() == weights.keys()
            assert [key for key in weights if not torch.equal(weights[key], last[key])] == [], name


def test_the_documented_loop_is_short() -> None:
    assert 8 <= len(documented().splitlines()) <= 20


def test_a_process_that_nothing_has_started_trains_alone_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    batches = list(loader({}))
    with Runner.create(SHAPE) as runner:
        optimizer = runner.optimizer(torch.optim.SGD(runner.model.parameters(), lr=0.1))
        first, second = (_step(runner, optimizer, batches[0]) for _ in range(2))
        assert second < first and runner.steps == 2
        before = runner.evaluate(batches[1]).item()
        logits = runner.predict({"tokens": batches[1]["tokens"]})
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batches[1]["labels"].flatten()
        )
        assert before == pytest.approx(losses.item(), rel=1e-5)
        runner.save(tmp_path / "saved", {"note": 5})
        _step(runner, optimizer, batches[2])
        assert runner.load(tmp_path / "saved") == {"note": 5}
        assert runner.steps == 2 and runner.evaluate(batches[1]).item() == before
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    with pytest.raises(RuntimeError, match="this Runner is closed"):
        runner.evaluate(batches[0])


def _step(runner: Runner, optimizer: Any, batch: Any) -> float:
    loss = runner.train(batch)
    optimizer.step()
    return loss.item()


def test_a_model_of_ones_own_is_built_of_the_context() -> None:
    built: list[torch.dtype] = []

    def build(context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        built.append(dtype)
        return CausalLM(SHAPE, context, dtype, seed=7)

    with Runner.create(build, "cpu", precision="bf16-true") as runner:
        assert built == [torch.bfloat16]
        assert runner.evaluate(next(iter(loader({})))).isfinite()


def test_the_gradient_has_a_norm_once_there_is_one() -> None:
    with Runner.create(CONFIG, "cpu") as runner:
        with pytest.raises(RuntimeError, match=r"call Runner.optimizer and train first"):
            runner.grad_norm()
        runner.optimizer(torch.optim.AdamW(runner.model.parameters()))
        runner.train(next(iter(loader({}))))
        grads = [p.main_grad for p in runner.model.parameters()]  # type: ignore[attr-defined]
        norm = torch.stack([grad.float().norm() for grad in grads]).norm()
        assert norm > 0
        torch.testing.assert_close(runner.grad_norm(), norm)


def test_what_cannot_work_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="precision='16-true' must be one of 32-true"):
        Runner.create(SHAPE, precision="16-true")
    with pytest.raises(ValueError, match="device='meta' does not work: use 'cuda' or 'cpu'"):
        Runner.create(SHAPE, "meta")
    with pytest.raises(ValueError, match="tensor_parallel_size=2 needs a multiple of 2 processes"):
        Runner.create(SHAPE, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="plan='auto'"):
        Runner.create(SHAPE, plan="auto")
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    with Runner.create(SHAPE) as runner:
        batch = next(iter(loader({})))
        with pytest.raises(RuntimeError, match=r"call Runner\.optimizer first"):
            runner.train(batch)
        with pytest.raises(ValueError, match="vocab_size=32: ids must be from 0 to 31"):
            runner.evaluate({**batch, "tokens": batch["tokens"] + 32})
        with pytest.raises(ValueError, match="leave out initialize_model_parallel"):
            Runner.create(SHAPE)
