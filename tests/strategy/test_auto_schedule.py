"""`schedule='auto'`: the schedule of a pipeline is chosen on real steps, kept, and used again."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam.autosearch import AutoSearch, elsewhere, session
from lightning_dhellam.autosearch.schedules import TRIED, Forecast, ScheduleSearch
from lightning_dhellam.pipeline.schedules import (
    Found,
    Placement,
    ScheduleError,
    dual_pipe_v,
    fold,
    kept,
    playable,
    restored,
    zero_bubble_v,
)
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile, Trials
from lightning_dhellam.strategy import DHellamStrategy
from tests.ranks import run_ranks
from tests.strategy.runs import (
    GLOBAL_BATCH,
    Losses,
    Model,
    join,
    loader,
    make_trainer,
    train,
)
from tests.strategy.runs import SHAPE as CONFIG

MOST = 1 + 6 * (TRIED + 1)
"""Steps of a search of schedules: the one that shows the values, and six of each."""
STEPS = MOST + 2
FEWEST = 1 + 2 * TRIED
SHAPE: dict[str, Any] = {"num_layers": 6, "hidden_dropout": 0.1}
MODEL = replace(CONFIG, **SHAPE)


class InUse(Callback):
    """The schedule of every step."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, DHellamStrategy)
        self.names.append(trainer.strategy.runner.agreed.schedule)


class Why(Callback):
    """What the search says of the schedule that it has chosen."""

    text = ""

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        search = AutoSearch.of(trainer)
        assert search is not None and search.findings is not None
        self.text = str(search.findings.schedule)


def _train(
    strategy: dict[str, Any],
    folder: Path,
    steps: int,
    *callbacks: Callback,
    path: str | None = None,
    keep: bool = False,
) -> list[float]:
    losses = Losses()
    trainer = make_trainer(
        {"micro_batch_size": 1, **strategy},
        [losses, *callbacks],
        max_steps=steps,
        enable_checkpointing=keep,
        default_root_dir=folder,
    )
    trainer.fit(Model(**SHAPE), loader(strategy, GLOBAL_BATCH * (STEPS + 8)), ckpt_path=path)
    return losses.values


def _on_two_stages(rank: int, folder: Path) -> dict[str, Any]:
    join(rank, 2)
    sizes = {"pipeline_parallel_size": 2}
    auto = {**sizes, "schedule": "auto"}
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STEPS)
    used, again, of_file, over, why = InUse(), InUse(), InUse(), InUse(), Why()
    plain = _train(sizes, folder, STEPS)
    with redirect_stdout(io.StringIO()) as said:
        losses = _train(auto, folder, STEPS, used, keep, keep=True)
    # A run that goes on, and one of the plan file, use what was found from their first step on.
    _train(auto, folder, STEPS + 2, again, path=str(folder / f"step={STEPS}.ckpt"))
    plan = str(folder / "search" / "plan.json")
    of_plan = _train({**auto, "plan": plan}, folder / "file", 3, of_file)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(session, "room_of", lambda runner: -1e12)
        _train(auto, folder / "full", FEWEST, over, why)
    return {
        "losses": [plain, losses, of_plan],
        "used": [one.names for one in (used, again, of_file, over)],
        "why": why.text,
        "said": said.getvalue() if rank == 0 else "",
    }


def test_all_stages_use_what_was_chosen_and_a_run_that_goes_on_too(tmp_path: Path) -> None:
    one, other = run_ranks(2, _on_two_stages, tmp_path)
    said = one.pop("said")
    assert not other.pop("said") and one == other
    plain, losses, of_plan = one["losses"]
    assert losses == plain and of_plan == plain[:3]
    used, again, of_file, over = one["used"]
    assert {"zb-v", "searched"} < set(used) and used[0] == "zb-v"
    name = used[-1]
    assert f"schedule '{name}' is used" in said
    # Where layers lie is decided at the start: what another placement would bring is said.
    for other in ("1f1b", "interleaved-1f1b"):
        assert f"'{other}' was not tried: its chunks lie on other stages; it is predicted" in said
    outcomes = json.loads((tmp_path / "search" / "outcomes.json").read_text())["schedule"]
    assert outcomes["name"] == name and all(row["measured"] > 0 for row in outcomes["outcomes"])
    assert {row["name"] for row in outcomes["outcomes"]} >= {"zb-v", "searched"}
    profile = Profile.load(tmp_path / "search" / "profile.json")
    assert {(row.source, row.target) for row in profile.transfers} == {(0, 1)}
    # Kept in the checkpoint and in the plan file, by name or as a table.
    assert PlanFile.load(tmp_path / "search" / "plan.json").schedule["name"] == name
    assert again == [name] * 2 and of_file == [name] * 3
    # Nothing fits: it stays with what it has begun with.
    assert set(over) == {"zb-v"}
    assert "the only one that keeps the memory" in one["why"]
    assert "has no room for what it would save" in one["why"]


def _on_four_stages(rank: int, folder: Path) -> list[str]:
    join(rank, 4)
    used = InUse()
    _train({"pipeline_parallel_size": 4, "schedule": "auto"}, folder, MOST + 1, used)
    return used.names


def test_four_stages_choose_together(tmp_path: Path) -> None:
    first, *others = run_ranks(4, _on_four_stages, tmp_path)
    assert others == [first] * 3
    assert {"zb-v", "searched"} < set(first)


def test_of_one_stage_there_is_nothing_to_choose() -> None:
    used = InUse()
    assert train({"schedule": "auto"}, callbacks=[used]) == train({"schedule": "fold"})
    assert used.names == ["fold"] * 4


def test_what_was_on_trial_does_not_outlive_its_search() -> None:
    agreed = SimpleNamespace(schedule="fold")
    runner: Any = SimpleNamespace(
        agreed=agreed, use_schedule=lambda name, _: setattr(agreed, "schedule", name)
    )
    search = ScheduleSearch(runner, 2, None)
    search.leave()  # nothing was forecast
    schemes: Any = {"fold": fold, "zb-v": zero_bubble_v}
    search._forecast = Forecast({}, schemes)
    search._trials = Trials(tuple(schemes), 2)
    for leave in (search.leave, search.stop):
        while agreed.schedule != "zb-v":
            search.follow_next()
            search._trials.add(lambda: 1.0)
        leave()
        assert agreed.schedule == "fold" and search.chosen is None


def _of_one_name(rank: int, folder: Path) -> list[str]:
    """What is said of schedules that the ranks call alike, and of which each has another."""
    said = []
    sizes: dict[str, Any] = {"pipeline_parallel_size": 2}
    with Runner.create(MODEL, "cpu", **sizes) as runner:
        runner.use_schedule("searched", Found(zero_bubble_v(2, 5), fold))
        for scheme in (
            Found((zero_bubble_v, dual_pipe_v)[rank](2, 5), fold),
            (fold, zero_bubble_v)[rank],
        ):
            with pytest.raises(ValueError) as refused:
                runner.use_schedule("searched", scheme)
            said.append(str(refused.value))
        assert runner.agreed.schedule == "searched"
    file = folder / "mine.txt"
    own = folder / f"{rank}.txt"
    own.write_text(str((fold, zero_bubble_v)[rank](2, 4)))
    with pytest.MonkeyPatch.context() as patched:
        # As on hosts whose files differ.
        read = Path.read_text
        patched.setattr(Path, "read_text", lambda path: read(own if path == file else path))
        with pytest.raises(ValueError) as refused:
            Runner.create(MODEL, "cpu", schedule=str(file), **sizes)
        said.append(str(refused.value).replace(str(file), "mine.txt"))
    return said


def test_schedules_of_one_name_are_compared_by_their_works(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    other = "has other works on other ranks: every rank must be given the same schedule"
    for said in run_ranks(2, _of_one_name, tmp_path):
        assert [text.split(", and")[0] for text in said] == [
            f"schedule='{name}' {other}" for name in ("searched", "searched", "mine.txt")
        ]


def test_a_faster_schedule_elsewhere_is_told_with_the_remedy() -> None:
    seconds = {"fold": 3.0, "zb-v": 2.0, "1f1b": 1.6, "interleaved-1f1b": 4.0}
    lies = "its chunks lie on other stages; it is predicted to be"
    assert elsewhere._told(seconds, frozenset({"fold", "zb-v", "dualpipe-v"})) == {
        "1f1b": f"{lies} 1.25× as fast as 'zb-v', if there is memory for it: give schedule='1f1b'"
        " from the start",
        "interleaved-1f1b": f"{lies} 0.50× as fast as 'zb-v', if there is memory for it",
    }


def test_a_schedule_that_was_found_comes_back() -> None:
    scheme = Found(zero_bubble_v(2, 5), fold)
    name, again = restored(json.loads(json.dumps(kept("searched", scheme))), 2)
    assert name == "searched" and again(2, 5) == zero_bubble_v(2, 5)
    assert again(2, 4) == fold(2, 4), "steps of other numbers of micro-batches go by another"
    assert restored(kept("dualpipe-v", playable(Placement.folded(2))["dualpipe-v"]), 2)[0]
    with pytest.raises(ScheduleError, match="pipeline_parallel_size is 4: search again"):
        restored(kept("searched", scheme), 4)
