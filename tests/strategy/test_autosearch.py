"""AutoSearch in real training runs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.autosearch import (
    AutoSearch,
    candidates,
    exchanges,
    measuring,
    options,
    profiling,
    session,
)
from lightning_dhellam.autosearch import callback as autosearch
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.plan import BUILDERS, Collective, Lane
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import BenchError, Profile
from lightning_dhellam.search.model import Costs
from lightning_dhellam.strategy import DHellamStrategy
from tests.ranks import run_ranks
from tests.strategy.runs import (
    GLOBAL_BATCH,
    Losses,
    Model,
    Sequences,
    join,
    loader,
    make_trainer,
    train,
)

PLANS = ("sequential", "megatron", "dhellam", "interleaved", "pairs", "auto")
FILES = {
    "exposed.png",
    "outcomes.json",
    "plan.json",
    "profile.json",
    "report.html",
    "summary.txt",
    "timeline.png",
    "trace.json",
}
ROUNDS = 1
STEPS = 1 + len(PLANS) * (ROUNDS + 1) + 2
"""The one that shows the values, the measured ones, two traced ones."""


class InUse(Callback):
    """The plan of every step."""

    def __init__(self) -> None:
        self.plans: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, DHellamStrategy)
        self.plans.append(trainer.strategy.runner.plan_in_use)


class InUseExchange(Callback):
    """The collective that brings keys and values, once it is chosen: that ends the training."""

    found = ""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 2
        assert isinstance(trainer.strategy, DHellamStrategy)
        layer = trainer.strategy.runner.engine.layers[1]
        first = next(o for o in layer.forward.operators if o.lane is Lane.CP)
        self.found = "ring" if first.collective is Collective.EXCHANGE else "all_gather"


def searched(
    root: Path, steps: int = STEPS + 2, strategy: Mapping[str, Any] | None = None, **search: Any
) -> tuple[list[float], list[str]]:
    """Train with a search: the losses, and the plan of each step."""
    plans = InUse()
    given = {"micro_batch_size": 3, **(strategy or {})}
    losses = train(
        given,
        callbacks=[AutoSearch(rounds=ROUNDS, **search), plans],
        max_steps=steps,
        samples=GLOBAL_BATCH * (steps + 1),
        default_root_dir=root,
    )
    return losses, plans.plans


SIZES: dict[str, dict[str, Any]] = {
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "cp": {"context_parallel_size": 2, "context_exchange": "auto"},
    "dp": {},  # takes the ranks that the others leave
}
OnARank = tuple[list[float], list[float], list[str], dict[str, float], dict[str, float]]
"""Losses without and with a search, the plans of the latter, and by plan what a step would take on
this rank's stage alone and what it is predicted to take."""


def on_two_ranks(rank: int, root: Path) -> dict[str, OnARank]:
    join(rank, 2)
    return {kind: _on_a_rank(root / kind, sizes) for kind, sizes in SIZES.items()}


def _on_a_rank(folder: Path, sizes: dict[str, Any]) -> OnARank:
    strategy = {**sizes, "micro_batch_size": 3}
    steps = STEPS + 2
    samples = GLOBAL_BATCH * (steps + 1)
    layers = 4 if "pipeline_parallel_size" in sizes else 2
    model: dict[str, Any] = {"hidden_dropout": 0.1, "num_layers": layers}
    plain = train(strategy, Model(**model), max_steps=steps, samples=samples)
    plans, search = InUse(), AutoSearch(rounds=ROUNDS)
    losses = train(
        {**strategy, "plan": "auto"},
        Model(**model),
        max_steps=steps,
        samples=samples,
        default_root_dir=folder,
        callbacks=[search, plans],
    )
    found = search.findings
    assert found is not None
    alone = {name: step.seconds for name, step in found.predicted.items()}
    return plain, losses, plans.plans, alone, {o.name: o.predicted for o in found.outcomes}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, OnARank]]]:
    """The folder of the searches, and by rank what came of each kind."""
    root = tmp_path_factory.mktemp("searches")
    return root, run_ranks(2, on_two_ranks, root)


@pytest.mark.parametrize("kind", SIZES)
def test_a_searched_run_has_the_same_losses_and_all_ranks_the_same_plan(
    on_ranks: tuple[Path, list[dict[str, OnARank]]], kind: str
) -> None:
    root, by_rank = on_ranks
    results = [found[kind] for found in by_rank]
    for plain, losses, *_ in results:
        assert losses == plain, "the search changed the losses"
    predicted = results[0][4]
    assert predicted == results[1][4]
    for name, seconds in predicted.items():
        stages = [alone[name] for *_, alone, _ in results]
        # A stage waits while the other begins and ends.
        longer = seconds > max(stages) * 1.01
        assert longer if kind == "pp" else stages == [seconds] * 2, name
    plans = results[0][2]
    assert plans == results[1][2]
    assert plans[0] == "sequential" and sorted(plans[1:7]) == sorted(PLANS)
    assert sorted(plans[7:13]) == sorted(PLANS)
    folder = root / kind / "search"
    overlap = {"overlap.png"} if kind != "pp" else set()
    assert {path.name for path in folder.iterdir()} == FILES | overlap
    found = json.loads((folder / "outcomes.json").read_text())
    assert plans[-1] == found["winner"]
    # Of two ranks each adds but one number to a gradient, so either way gives the same bits.
    ways = re.search(
        "keys and values come by (ring|all_gather)", (folder / "summary.txt").read_text()
    )
    assert bool(ways) is (kind == "cp")
    assert {row["name"] for row in found["outcomes"]} == set(PLANS)
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in found["outcomes"])
    profile = Profile.load(folder / "profile.json")
    assert profile.fingerprint.sizes[kind] == 2
    # Transfers between stages are in no profile.
    exposed = {kind} if overlap else set()
    # Gradients are added up over ranks that share sequences too.
    exposed |= {"dp"} if kind == "cp" else set()
    assert all(set(row["exposed"]) == exposed for row in found["outcomes"])
    assert bool({row.partner for row in profile.timings} - {None}) == bool(overlap)
    names = [
        event["args"]["name"]
        for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
        if event["name"] == "process_name"
    ]
    assert {"sequential, measured", "sequential, predicted"} <= set(names)


def exchanged(
    slow: Collective, folder: Path, way: str = "auto", memory_limit: float | None = None
) -> str | None:
    """The way of keys and values that is in use after a search where one is slow."""
    link = Link(1e9, collectives=((slow, Link(1e6, latency=15e-3)),))
    exchange = InUseExchange()
    strategy = {
        "plan": "auto",
        "context_parallel_size": 2,
        "context_exchange": way,
        "micro_batch_size": 3,
        "emulate": Cluster(2, {"cp": link}),
    }
    callbacks = [AutoSearch(rounds=ROUNDS, memory_limit=memory_limit), exchange]
    trainer = make_trainer(strategy, callbacks, devices=1, max_steps=STEPS, default_root_dir=folder)
    data = Sequences((STEPS + 1) * GLOBAL_BATCH)
    trainer.fit(Model(), DataLoader(data, batch_size=GLOBAL_BATCH))
    return exchange.found


@pytest.mark.parametrize("slow", [Collective.EXCHANGE, Collective.ALL_GATHER])
def test_keys_come_by_the_faster_way(slow: Collective, tmp_path: Path) -> None:
    found = exchanged(slow, tmp_path)
    assert found == ("all_gather" if slow is Collective.EXCHANGE else "ring")


def test_keys_come_by_a_way_that_keeps_the_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"memory_limit=1 bytes: the least found"):
        exchanged(Collective.EXCHANGE, tmp_path, memory_limit=1)
    real = exchanges.solve

    def solve(layers: Any, *args: Any, memory_limit: float | None = None, **kwargs: Any) -> Any:
        assert memory_limit == 2e12
        found = {o.collective for pair in layers for o in pair.forward.operators}
        if Collective.ALL_GATHER in found:
            raise ValueError("memory_limit=2e12: all keys at once do not fit")
        return real(layers, *args, memory_limit=memory_limit, **kwargs)

    monkeypatch.setattr(exchanges, "solve", solve)
    # The ring is slower here.
    assert exchanged(Collective.EXCHANGE, tmp_path, memory_limit=2e12) == "ring"


def test_plan_auto_searches_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    steps = 1 + len(PLANS) * 6 + 2
    train(
        {"plan": "auto", "micro_batch_size": 3},
        max_steps=steps,
        samples=GLOBAL_BATCH * (steps + 1),
        logger=logger,
        log_every_n_steps=1,
    )
    printed = capsys.readouterr().out
    summary = (tmp_path / "search" / "summary.txt").read_text()
    assert summary in printed
    for name in PLANS:
        assert f"\n* {name} " in summary or f"\n  {name} " in summary
    assert "* installed: '" in summary and "over megatron" in summary
    with (tmp_path / "metrics.csv").open() as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {f"search/{name}/measured_ms" for name in PLANS} <= logged


def test_its_plan_file_trains_and_is_refused_elsewhere(tmp_path: Path) -> None:
    losses, plans = searched(tmp_path)
    file = tmp_path / "search" / "plan.json"
    assert {path.name for path in file.parent.iterdir()} == FILES  # nothing communicates
    assert PlanFile.load(file).notes["plan"] == plans[-1]
    steps = len(losses)
    samples = GLOBAL_BATCH * (steps + 1)
    again = train({"plan": str(file), "micro_batch_size": 3}, max_steps=steps, samples=samples)
    assert again == losses
    with pytest.raises(ValueError, match=r": micro_batch_size is 3 in the file and 2 here"):
        train({"plan": str(file), "micro_batch_size": 2})
    with pytest.raises(ValueError, match=r": ffn_hidden_size is 32 in the file and 64 here"):
        train({"plan": str(file), "micro_batch_size": 3}, Model(ffn_hidden_size=64))


def test_a_plan_file_in_use_is_a_candidate(tmp_path: Path) -> None:
    searched(tmp_path)
    file = str(tmp_path / "search" / "plan.json")
    _, plans = searched(tmp_path / "again", STEPS + 4, {"plan": file})
    assert file in plans[1:8]


class Stop(Callback):
    """Ends training after 7 steps, which nobody could know."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 1 + len(PLANS)


def test_training_that_ends_too_soon_chooses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = InUse()
    train(
        {"micro_batch_size": 3},
        callbacks=[AutoSearch(rounds=ROUNDS), plans, Stop()],
        max_steps=STEPS,
        samples=GLOBAL_BATCH * STEPS,
        default_root_dir=tmp_path,
    )
    assert "training ended 6 steps before every plan was measured" in capsys.readouterr().out
    assert not (tmp_path / "search").exists() and len(plans.plans) == 7


def test_training_that_is_too_short_is_not_profiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plans = searched(tmp_path, 2 * len(PLANS) - 1)
    assert "11 steps of training are too few to choose a plan" in capsys.readouterr().out
    assert set(plans) == {"interleaved"}, "the plan that was given"


def test_what_was_in_use_stays_when_nothing_is_chosen(tmp_path: Path) -> None:
    for plan, stays in (("auto", "sequential"), ("megatron", "megatron")):
        trainer = make_trainer(
            {"plan": plan}, [AutoSearch()], max_steps=4, default_root_dir=tmp_path
        )
        used = []

        class Last(Callback):
            def on_train_end(self, trainer: Trainer, *_: Any) -> None:
                used.append(trainer.strategy.runner.plan_in_use)  # type: ignore[attr-defined] # noqa: B023

        trainer.callbacks.append(Last())  # type: ignore[attr-defined]
        trainer.fit(Model(), loader({}))
        assert used == [stays]


def test_training_that_ends_after_a_whole_round_chooses_from_it(tmp_path: Path) -> None:
    searched(tmp_path, STEPS - 2)
    assert (tmp_path / "search" / "plan.json").exists()


def test_a_run_that_goes_on_uses_the_plan_of_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it fits; one of the middle of a search has none, so all is measured anew."""

    def fit(steps: int, path: str | None = None, micro_batch_size: int = 3) -> list[str]:
        plans = InUse()
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(
            {"micro_batch_size": micro_batch_size, "plan": "auto"},
            [AutoSearch(rounds=ROUNDS), plans, keep],
            max_steps=steps,
            enable_checkpointing=True,
            default_root_dir=tmp_path,
        )
        trainer.fit(Model(), loader({}, GLOBAL_BATCH * 40), ckpt_path=path)
        return plans.plans

    end = -(-STEPS // 3) * 3
    fit(end)
    winner = json.loads((tmp_path / "search" / "outcomes.json").read_text())["winner"]
    capsys.readouterr()
    assert fit(end + 3, f"{tmp_path}/step={end}.ckpt") == [winner] * 3
    assert f"search: '{winner}' is used, which the checkpoint has" in capsys.readouterr().out
    # The plan is kept for those that follow.
    assert fit(end + 4, f"{tmp_path}/step={end + 3}.ckpt") == [winner]
    other = fit(end + 2, f"{tmp_path}/step={end}.ckpt", micro_batch_size=2)
    said = capsys.readouterr().out
    assert set(other) == {"sequential"} and "micro_batch_size is 3 in the file and 2 here" in said
    again = fit(end, f"{tmp_path}/step=3.ckpt")
    assert len(set(again)) > 1 and "search: measuring" in capsys.readouterr().out


def test_a_replayed_search_needs_one_step(tmp_path: Path) -> None:
    losses, plans = searched(tmp_path, 3, replay=True, folder=str(tmp_path / "here"))
    winner = json.loads((tmp_path / "here" / "outcomes.json").read_text())["winner"]
    assert plans[1:] == [winner, winner]
    steps = {"max_steps": 3, "samples": GLOBAL_BATCH * 4}
    assert losses == train({"micro_batch_size": 3}, **steps)


class Remade(Callback):
    """What is made again at the end, and the most bytes of slots in the steps before.

    And what the run holds besides.
    """

    what: Any = None
    away: Any = None
    peak = held = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, DHellamStrategy)
        runner = trainer.strategy.runner
        self.what, self.away = runner.agreed.recompute, runner.agreed.offload
        self.peak = runner.engine.lanes.ledger.peak_bytes
        self.held = runner.model_states.total
        runner.engine.lanes.ledger.peak_bytes = 0


def test_what_is_made_again_is_chosen_by_measured_times_and_kept_in_the_plan_file(
    tmp_path: Path,
) -> None:
    sizes: dict[str, Any] = {"num_layers": 4, "hidden_dropout": 0.1}
    end = Remade()

    def trained(state: Any = None, **strategy: Any) -> list[float]:
        callbacks: list[Callback] = [end]
        if strategy.get("plan") == "auto":
            search = AutoSearch(rounds=1, replay=state is None, folder=str(tmp_path))
            if state is not None:
                search.load_state_dict(state)
            callbacks = [search, *callbacks]
        given = {"micro_batch_size": 2, **strategy}
        return train(given, Model(**sizes), callbacks=callbacks)

    kept = trained(recompute="none", plan="sequential")
    held = end.held
    limit = f"{(held + end.peak * 0.6) / 0.97 / 2**20:.6f}MiB"
    most = end.peak
    assert trained(plan="auto", recompute="auto", memory_limit=limit) == kept
    assert end.peak <= 0.65 * most
    chosen = end.what
    assert set(chosen) == {"0", "1", "2", "3", "head"}
    assert any(value != "none" for value in chosen.values())
    file = tmp_path / "plan.json"
    assert PlanFile.load(file).recompute == chosen
    assert trained(plan=str(file), recompute="auto") == kept
    assert end.what == chosen
    # A checkpoint has the plans as well.
    state = {"name": "auto", "plans": PlanFile.load(file).fields}
    assert trained(state, plan="auto", recompute="auto") == kept
    assert end.what == chosen
    with pytest.raises(ValueError, match="no smaller micro-batch, recomputation or parallel size"):
        trained(plan="auto", recompute="auto", memory_limit=f"{held / 2**20:.6f}MiB")


def test_what_waits_on_the_host_is_chosen_by_measured_times_and_kept_in_the_plan_file(
    tmp_path: Path,
) -> None:
    end, both = Remade(), {"recompute": "auto", "offload": "auto"}

    def trained(state: Any = None, **strategy: Any) -> list[float]:
        callbacks: list[Callback] = [end]
        if strategy.get("plan") == "auto":
            search = AutoSearch(rounds=1, replay=state is None, folder=str(tmp_path))
            if state is not None:
                search.load_state_dict(state)
            callbacks = [search, *callbacks]
        model = Model(num_layers=4, hidden_dropout=0.1)
        return train({"micro_batch_size": 2, **strategy}, model, callbacks=callbacks)

    kept = trained(recompute="none", plan="sequential")
    limit = f"{(end.held + end.peak * 0.4) / 0.97 / 2**20:.6f}MiB"
    most = end.peak
    assert trained(plan="auto", memory_limit=limit, **both) == kept
    assert end.peak <= 0.6 * most, "whatever plan was the fastest of those tried"
    chosen = end.what, end.away
    assert end.away and set(end.away) <= {"0", "1", "2", "3", "head"}
    file = tmp_path / "plan.json"
    found = PlanFile.load(file)
    assert (found.recompute, found.offload) == chosen
    assert trained(plan=str(file), **both) == kept
    assert (end.what, end.away) == chosen
    with pytest.raises(
        ValueError, match=r"was searched with slots on the host.*say offload='auto'"
    ):
        trained(plan=str(file), recompute="auto")
    # A checkpoint has the plans as well.
    state = {"name": "auto", "plans": found.fields}
    assert trained(state, plan="auto", **both) == kept
    assert (end.what, end.away) == chosen
    for wrong, said in (
        ({"7": ["x"]}, "offload has slots of layer '7', which the model has not: its layers are 0"),
        ({"1": ["gateup"]}, "offload names 'gateup', which no layer has"),
        (["x"], "plan.json is not a whole plan file .'offload' must have slots by layer"),
    ):
        file.write_text(json.dumps({**found.fields, "offload": wrong}))
        with pytest.raises(ValueError, match=said):
            trained(plan=str(file), **both)


def test_batches_of_another_size_are_not_measured(tmp_path: Path) -> None:
    """An epoch of two and a half batches: the half one is trained, but says nothing."""
    plans = InUse()
    losses = Losses()
    trainer = make_trainer(
        {"micro_batch_size": 3},
        [AutoSearch(rounds=ROUNDS), plans, losses],
        max_epochs=8,
        default_root_dir=tmp_path,
    )
    data = DataLoader(Sequences(20), batch_size=GLOBAL_BATCH)
    trainer.fit(Model(), data)
    assert len(losses.values) == 24
    assert (tmp_path / "search" / "plan.json").exists()
    # The step that was not measured is repeated with the same plan.
    assert plans.plans[2] == plans.plans[3] and plans.plans[5] == plans.plans[6]


class OwnLoss(Model):
    """A loss of the user's own."""

    def compute_loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


class OwnBlock(Model):
    """A block of the user's own between Megatron's layers."""

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super().build_model(*args, **kwargs)
        width = self.model_config.hidden_size
        torch.manual_seed(3)
        model.layers.insert(1, torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU()))
        return model


class Counting(torch.nn.Module):
    """Depends on how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 1e-3 * float(self.calls))


class OwnBuffer(Model):
    """A block that keeps a count, and a loss that draws."""

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        model = super().build_model(*args, **kwargs)
        model.layers.insert(1, Counting())
        torch.manual_seed(3)
        return model

    def compute_loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return super().compute_loss(logits, batch) * (1 + torch.rand(()))


@pytest.mark.parametrize("kind", [OwnLoss, OwnBlock, OwnBuffer])
def test_what_runs_under_autograd_is_profiled_too(kind: type[Model], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": STEPS + 1,
        "samples": GLOBAL_BATCH * (STEPS + 2),
        "default_root_dir": tmp_path,
    }
    plain = train({"micro_batch_size": 3}, kind(), **options)
    losses = train(
        {"micro_batch_size": 3}, kind(), callbacks=[AutoSearch(rounds=ROUNDS)], **options
    )
    assert losses == plain
    assert (tmp_path / "search" / "plan.json").exists()


def test_an_odd_first_batch_is_not_what_is_searched_for(tmp_path: Path) -> None:
    plans = InUse()
    trainer = make_trainer(
        {"micro_batch_size": 3, "plan": "auto"},
        [AutoSearch(rounds=ROUNDS), plans],
        max_steps=STEPS + 14,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    data = Sequences(4 + GLOBAL_BATCH * (STEPS + 14))
    batches = [range(4)]
    starts = range(4, len(data) - GLOBAL_BATCH, GLOBAL_BATCH)
    batches += [range(start, start + GLOBAL_BATCH) for start in starts]
    trainer.fit(Model(), DataLoader(data, batch_sampler=batches))  # type: ignore[arg-type]
    profile = Profile.load(tmp_path / "search" / "profile.json")
    assert profile.fingerprint.shapes["micro_batch_size"] == 3
    assert len(set(plans.plans)) == len(PLANS)


def test_batches_that_always_differ_end_the_search_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = InUse()
    trainer = make_trainer(
        {"micro_batch_size": 3, "plan": "auto"},
        [plans],
        max_steps=30,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    data = Sequences(31 * 32)
    batches = [range(sum(range(n)), sum(range(n + 1))) for n in range(1, 31)]
    trainer.fit(Model(), DataLoader(data, batch_sampler=batches))  # type: ignore[arg-type]
    assert "batches differ in size from step to step" in capsys.readouterr().out
    assert plans.plans[-1] == "sequential" and not (tmp_path / "search").exists()


class Failing(Callback):
    """An optimizer step that goes wrong in the middle of the search."""

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS - 3:
            raise ArithmeticError("the optimizer broke")


def test_a_step_that_fails_is_not_taken_for_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[None] = []
    monkeypatch.setattr(session.Session, "_choose", lambda self: chosen.append(None))
    with pytest.raises(ArithmeticError, match="the optimizer broke"):
        train(
            {"micro_batch_size": 3},
            callbacks=[AutoSearch(rounds=ROUNDS), Failing()],
            max_steps=STEPS,
            samples=GLOBAL_BATCH * (STEPS + 1),
            default_root_dir=tmp_path,
        )
    assert not chosen


def test_a_folder_that_cannot_be_written_does_not_end_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.warns(UserWarning, match="could not be written"):
        losses, _ = searched(tmp_path, 3, replay=True, folder=str(tmp_path / "taken" / "below"))
    assert len(losses) == 3
    printed = capsys.readouterr().out
    assert "* installed: " in printed and "files:" not in printed


def test_a_profile_is_used_again_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "profile.json"
    searched(tmp_path, 2, profile=str(file))
    assert Profile.load(file).timings

    def measured_again(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measuring, "take_profile", measured_again)
    searched(tmp_path, STEPS, profile=str(file))
    assert (tmp_path / "search" / "plan.json").exists()
    with pytest.raises(ValueError, match=r": micro_batch_size is 3 in the file and 2 here"):
        searched(tmp_path, 2, {"micro_batch_size": 2}, profile=str(file))


def test_a_profile_that_is_none_or_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{"format": 1, "plans": []}')
    with pytest.raises(ValueError, match=r"plan.json is a plan file, but a profile is wanted"):
        AutoSearch(profile=str(file))
    below = file / "profile.json"
    with pytest.raises(ValueError, match=rf"^profile={below}: {file} is not a folder"):
        AutoSearch(profile=str(below))
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be read as a profile"):
        AutoSearch(profile=str(tmp_path))


def fails_on_one_rank(rank: int, folder: Path) -> str:
    """The message of a search in which an operator fails on rank 1."""
    join(rank, 2)
    subject = profiling.EngineBench._subject

    def broken(self: Any, target: Any) -> Any:
        found = subject(self, target)
        if rank == 1 and target.operator.name == "fc1.dgrad":
            return found._replace(operator=replace(found.operator, run=_broken))
        return found

    profiling.EngineBench._subject = broken  # type: ignore[method-assign]
    with pytest.raises(BenchError) as caught:
        train(
            {"tensor_parallel_size": 2, "plan": "auto"},
            max_steps=STEPS,
            samples=GLOBAL_BATCH * STEPS,
            default_root_dir=folder,
        )
    return str(caught.value)


def _broken(*_: Any) -> None:
    raise ArithmeticError("no such kernel")


def test_an_operator_that_fails_is_named_on_every_rank(tmp_path: Path) -> None:
    messages = run_ranks(2, fails_on_one_rank, tmp_path)
    assert messages == [
        "measuring transformer/fc1.dgrad failed: it failed on another rank, whose message says why",
        "measuring transformer/fc1.dgrad failed: no such kernel",
    ]
    assert not list(tmp_path.rglob("profile.json"))


def test_noise_keeps_sequential_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(outcomes: Any, table: Any) -> Any:
        times = {"sequential": 1.0, "auto": 0.9}
        return [replace(o, measured=times.get(o.name, 2.0), spread=0.1) for o in outcomes]

    monkeypatch.setattr(session, "measured", noisy)
    _, plans = searched(tmp_path)
    assert plans[-1] == "sequential"
    assert "installed: 'sequential', 'auto' beats it by 100.000 ms only" in capsys.readouterr().out


def test_other_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"AutoSearch searches plans of DHellamStrategy"):
        train("auto", callbacks=[AutoSearch()])
    with pytest.raises(ValueError, match=r"rounds=0 must be at least 1"):
        AutoSearch(rounds=0)
    with pytest.raises(ValueError, match=r"memory_slack=-0.1 must be at least 0"):
        AutoSearch(memory_slack=-0.1)


def test_memory_that_no_order_keeps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory_limit=1 bytes: the least found"):
        searched(tmp_path, memory_limit=1)


@pytest.mark.parametrize("share", [None, 0.5])
def test_searched_plans_may_take_a_share_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    given: list[float | None] = []
    real = candidates.solve

    def solve(*args: Any, memory_slack: float | None = None, **kwargs: Any) -> Any:
        given.append(memory_slack)
        return real(*args, memory_slack=memory_slack, **kwargs)

    monkeypatch.setattr(candidates, "solve", solve)
    monkeypatch.setattr(session.Session, "_peak_bytes", lambda _: 1000.0)
    searched(tmp_path, **({} if share is None else {"memory_slack": share}))
    expected = 1000.0 * (options.MEMORY_SLACK if share is None else share)
    assert given and given[0] == expected


def test_plans_that_need_more_memory_than_allowed_are_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def peak(layers: Any, builder: Any, *args: Any, **kwargs: Any) -> float:
        return 3e12 if builder in (BUILDERS["interleaved"], BUILDERS["sequential"]) else 1.0

    monkeypatch.setattr(candidates, "peak_bytes", peak)
    _, plans = searched(tmp_path, strategy={"plan": "auto"}, memory_limit=2e12)
    assert "interleaved" not in plans and {"sequential", "dhellam", "auto"} <= set(plans)
    said = "'interleaved' is not tried: it needs 3000000000000 bytes in a pair of layers, and"
    assert f"{said} memory_limit=2000000000000" in capsys.readouterr().out


def test_auto_is_attached_once_and_before_others() -> None:
    other = InUse()
    trainer = make_trainer({"plan": "auto"}, [other])
    autosearch.AutoSearch.attach(trainer, plans=True, schedules=False)
    autosearch.AutoSearch.attach(trainer, plans=True, schedules=False)
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds.count(AutoSearch) == 1 and kinds.index(AutoSearch) < kinds.index(InUse)


def test_built_in_plans_are_all_candidates() -> None:
    assert set(BUILDERS) <= set(PLANS)


def with_a_limit(rank: int, folder: Path) -> list[str]:
    """A search of a pipeline whose second stage alone finds that a plan needs too much."""
    join(rank, 2)

    def needs(layers: Any, builder: Any, *args: Any, **kwargs: Any) -> float:
        return 3e12 if rank == 1 and builder is BUILDERS["dhellam"] else 1.0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(candidates, "peak_bytes", needs)
        strategy = {"pipeline_parallel_size": 2, "micro_batch_size": 3, "schedule": "1f1b"}
        return searched(folder, strategy=strategy, memory_limit=2e12)[1]


def test_what_one_stage_leaves_out_none_tries(tmp_path: Path) -> None:
    first, second = run_ranks(2, with_a_limit, tmp_path)
    assert first == second
    assert set(PLANS) - {"dhellam"} == set(first)


def with_spares(rank: int, folder: Path) -> list[str]:
    """A search of a pipeline whose second stage alone has GEMMs, which can leave processors."""
    join(rank, 2)

    class Measured:
        @staticmethod
        def of(profile: Profile) -> Costs:
            gemms = {key: key for key in profile.lanes if key.endswith(".gemm")}
            assert bool(gemms) == bool(rank)
            return replace(Costs.of(profile), spares=gemms)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(candidates, "Costs", Measured)
        strategy = {"pipeline_parallel_size": 2, "micro_batch_size": 3}
        return searched(folder, strategy=strategy, steps=STEPS + 6)[1]


def test_what_one_stage_can_spare_all_try(tmp_path: Path) -> None:
    first, second = run_ranks(2, with_spares, tmp_path)
    assert first == second
    assert {*PLANS, "spare"} == set(first)


def with_profile_and_plan(rank: int, root: Path) -> tuple[list[float], list[float], list[str]]:
    """Two searches of a pipeline with one profile, and a run with the plan that they wrote."""
    join(rank, 2)
    # Embedding and head stand alone on the first stage, all layers on the second.
    strategy = {"pipeline_parallel_size": 2, "micro_batch_size": 3}
    for name in ("first", "second"):
        losses, _ = searched(root / name, strategy=strategy, profile=root / "profile.json")
    plan = root / "second" / "search" / "plan.json"
    samples = GLOBAL_BATCH * (STEPS + 3)
    again = train({**strategy, "plan": str(plan)}, max_steps=STEPS + 2, samples=samples)
    return losses, again, sorted(PlanFile.load(plan).graphs.values())


def test_stages_keep_their_own_profiles_and_share_one_plan_file(tmp_path: Path) -> None:
    for losses, again, graphs in run_ranks(2, with_profile_and_plan, tmp_path):
        assert losses == again
        kinds = ("embedding", "head", "transformer")
        assert graphs == [f"{k} {way}" for k in kinds for way in ("backward", "forward")]
    names = sorted(path.name for path in tmp_path.glob("profile*.json"))
    assert names == ["profile-stage0.json", "profile-stage1.json"]
