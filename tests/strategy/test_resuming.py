"""Resuming: each parameter gets its own state back, and settings that differ are said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

from lightning_dhellam.checkpoint import content
from lightning_dhellam.strategy.resuming import of_other_ranks
from tests.checkpoint.first_format import make_old
from tests.strategy.runs import Model, loader, make_trainer

FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, "32-true"),
    "master-weights": ({}, "bf16-mixed"),
    "sharded": ({"distributed_optimizer": True}, "bf16-mixed"),
}


class Grouped(Model):
    """Matrices and vectors in groups of their own, whose rates differ a hundredfold."""

    def __init__(
        self,
        order: tuple[int, ...] = (0, 1),
        schedule: Any = None,
        joined: bool = False,
        frozen: bool = False,
        lr: float = 1e-2,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.order, self.schedule, self.joined, self.frozen = order, schedule, joined, frozen
        self.lr, self.settings = lr, settings

    def configure_optimizers(self) -> Any:
        if self.frozen:
            self.model.final_norm.weight.requires_grad_(False)
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "lr": self.lr},
            {"params": [p for p in trained if p.dim() == 1], "lr": self.lr / 100},
        ]
        given: Any = trained if self.joined else [groups[i] for i in self.order]
        optimizer = torch.optim.AdamW(given, lr=self.lr, **self.settings)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Rates(Callback):
    """The learning rate of each group in each step."""

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.values.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def _fit(
    module: Grouped, steps: int, form: str = "plain", keep: Path | None = None, **resume: Any
) -> tuple[list[list[float]], list[str]]:
    """The rates of each step, and what was said."""
    strategy, precision = FORMS[form]
    if "resume_settings" in resume:
        strategy = {**strategy, "resume_settings": resume.pop("resume_settings")}
    rates = Rates()
    callbacks: list[Callback] = [rates]
    if keep is not None:
        callbacks.append(ModelCheckpoint(keep, filename="a", every_n_train_steps=3))
    trainer = make_trainer(
        strategy,
        callbacks,
        precision=precision,
        max_steps=steps,
        enable_checkpointing=keep is not None,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, loader(strategy), **resume)
    lines = [str(warning.message) for warning in said]
    return rates.values, [line for line in lines if line.startswith("resuming: ")]


def _differences(one: Grouped, other: Grouped) -> list[str]:
    theirs = dict(other.named_parameters())
    return [n for n, p in one.named_parameters() if not torch.equal(p, theirs[n])]


def _exponential(optimizer: torch.optim.Optimizer) -> Any:
    return ExponentialLR(optimizer, 0.7)


@pytest.mark.parametrize("form", FORMS)
def test_groups_and_their_state_are_matched_by_names(form: str, tmp_path: Path) -> None:
    straight, before, after = (Grouped(o, _exponential) for o in ((0, 1), (0, 1), (1, 0)))
    expected, _ = _fit(straight, 5, form)
    _fit(before, 3, form, tmp_path)
    found, said = _fit(after, 5, form, ckpt_path=tmp_path / "a.ckpt")
    assert found == [rates[::-1] for rates in expected[3:]]
    assert not _differences(straight, after)
    assert not said


def test_a_checkpoint_of_version_0_1_is_read_by_position(tmp_path: Path) -> None:
    straight, after = Grouped(), Grouped()
    _fit(straight, 5, "master-weights")
    _fit(Grouped(), 3, "master-weights", tmp_path)
    make_old(tmp_path / "a.ckpt")
    file = tmp_path / "a.ckpt" / "state-00000.pt"
    new = content.read(file)
    flat = [name for group in new["groups"] for name in group["names"]]
    groups = []
    for group in new["groups"]:
        own = {key: value for key, value in group.items() if key != "names"}
        groups.append({**own, "params": [flat.index(name) for name in group["names"]]})
    state = {flat.index(name): value for name, value in new["state"].items()}
    masters = [new["master_weights"][name] for name in flat]
    optimizer = {"state": state, "param_groups": groups}
    torch.save({"optimizer": optimizer, "master_weights": masters}, file)
    _fit(after, 5, "master-weights", ckpt_path=tmp_path / "a.ckpt")
    assert not _differences(straight, after)
    with pytest.raises(ValueError, match=r"groups of \[10, 5\] parameters.*of \[15\]"):
        _fit(Grouped(joined=True), 5, "master-weights", ckpt_path=tmp_path / "a.ckpt")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after 3 steps."""
    folder = tmp_path_factory.mktemp("kept")
    _fit(Grouped(weight_decay=0.1), 3, keep=folder)
    return folder / "a.ckpt"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"joined": True}, "parameter group 0 .*model.embedding.* and 14 more.*the checkpoint's 2"),
        ({"frozen": True}, "state of 'model.final_norm.weight', which has not been trained"),
    ],
)
def test_what_cannot_be_matched_is_refused_by_name(
    kept: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        _fit(Grouped(weight_decay=0.1, **changes), 4, ckpt_path=kept)
    assert "\n" not in str(caught.value)


def test_other_groups_are_taken_where_the_arguments_win(kept: Path) -> None:
    module = Grouped(weight_decay=0.1, joined=True, lr=5e-3)
    rates, _ = _fit(module, 4, ckpt_path=kept, resume_settings="arguments")
    assert rates == [[5e-3]]


def test_each_setting_that_the_checkpoint_overrides_is_said_once(kept: Path) -> None:
    other = {"lr": 1e-3, "weight_decay": 0.5, "betas": (0.9, 0.95)}
    rates, said = _fit(Grouped(**other), 4, ckpt_path=kept)
    assert rates == [[1e-2, 1e-4]]
    wins = "as this run was given; with resume_settings='arguments' this run's wins"
    for start, given in (
        ("lr of parameter group 0: 0.01", "0.001"),
        ("lr of parameter group 1: 0.0001", "1e-05"),
        ("weight_decay: 0.1", "0.5"),
        ("betas: (0.9, 0.999)", "(0.9, 0.95)"),
    ):
        assert said.count(f"resuming: {start}, as in the checkpoint, not {given}, {wins}") == 1
    assert len(said) == 4
    rates, said = _fit(Grouped(**other), 4, ckpt_path=kept, resume_settings="arguments")
    assert rates == [[1e-3, 1e-5]]
    assert (
        "resuming: weight_decay: 0.5, as this run was given, not 0.1, as in the checkpoint" in said
    )


def _linear(total: int) -> Any:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return LambdaLR(optimizer, lambda step: max(0.1, 1 - step / total))

    return make


def test_a_jump_of_the_learning_rate_is_said(tmp_path: Path) -> None:
    _fit(Grouped(schedule=_linear(3)), 3, keep=tmp_path)
    rates, said = _fit(Grouped(schedule=_linear(12)), 5, ckpt_path=tmp_path / "a.ckpt")
    assert rates[0][0] == pytest.approx(0.001) and rates[1][0] == pytest.approx(0.01 * 2 / 3)
    (line,) = said
    assert "learning rate of parameter group 0 jumps after the next step" in line
    assert "ended at 0.001" in line and "has 0.0075" in line
    straight, _ = _fit(Grouped(schedule=_linear(12), lr=2e-3), 5)
    given = Grouped(schedule=_linear(12), lr=2e-3)
    settings = {"resume_settings": "arguments"}
    rates, said = _fit(given, 5, ckpt_path=tmp_path / "a.ckpt", **settings)
    assert rates == straight[3:]
    assert "jumps now: the checkpoint ended at 0.001" in said[-1] and "has 0.0015" in said[-1]


def _cosine(total: int) -> Any:
    return lambda optimizer: CosineAnnealingLR(optimizer, total)


def _cycle(total: int) -> Any:
    return lambda optimizer: OneCycleLR(optimizer, 0.01, total)


def _sequence(total: int) -> Any:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        parts = [LinearLR(optimizer, 0.5, total_iters=2), CosineAnnealingLR(optimizer, total)]
        return SequentialLR(optimizer, parts, [2])

    return make


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        (_cosine, "CosineAnnealingLR.T_max"),
        (_cycle, "OneCycleLR.total_steps"),
        (_sequence, "CosineAnnealingLR.T_max"),
    ],
)
def test_who_wins_holds_for_the_schedule_as_well(schedule: Any, name: str, tmp_path: Path) -> None:
    short, _ = _fit(Grouped(schedule=schedule(8)), 5, keep=tmp_path)
    long, _ = _fit(Grouped(schedule=schedule(20)), 5)
    checkpoint = tmp_path / "a.ckpt"
    rates, said = _fit(Grouped(schedule=schedule(20)), 5, ckpt_path=checkpoint)
    assert rates == short[3:]
    assert any(
        line.startswith(f"resuming: {name}: 8, as in the checkpoint, not 20") for line in said
    )
    settings = {"resume_settings": "arguments"}
    rates, said = _fit(Grouped(schedule=schedule(20)), 5, ckpt_path=checkpoint, **settings)
    assert any(line.startswith(f"resuming: {name}: 20, as this run was given") for line in said)
    if schedule is _cosine:  # of which the rate at a step is known without the steps before it
        assert rates[0] == pytest.approx(long[3]) and rates[1] == pytest.approx(long[4])


def test_an_unknown_value_of_resume_settings_is_refused() -> None:
    with pytest.raises(ValueError, match="resume_settings='new' must be one of checkpoint, arg"):
        make_trainer({"resume_settings": "new"})


def test_a_loader_with_a_place_of_its_own_is_said_where_other_ranks_have_saved_it() -> None:
    def loops(*states: dict[str, Any]) -> dict[str, Any]:
        return {"fit_loop": {"state_dict": {"combined_loader": [*states]}}}

    theirs = {"_num_yielded": 3}  # as torchdata's StatefulDataLoader has it
    said = of_other_ranks(loops(theirs), 2, 1)
    assert said is not None and "2 data-parallel ranks" in said and "\n" not in said
    assert of_other_ranks(loops(theirs), 2, 2) is None
    assert of_other_ranks(loops({"samples": 24}, {}), 2, 1) is None
    assert of_other_ranks({}, None, 1) is None
