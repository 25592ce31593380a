"""The best way to spread a model: nothing is lost by pruning, and what is found can be run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lightning_dhellam.advice import Adviser, Conditions, PlanSearch, Question, memory_of
from lightning_dhellam.advice.advise import _SURE
from lightning_dhellam.advice.bounds import least_bytes, least_time
from lightning_dhellam.advice.choices import run_of, runs, shape_of, topologies
from lightning_dhellam.advice.predict import choice_of
from lightning_dhellam.advice.priceable import Priceable
from lightning_dhellam.commands.advise import recipe_of
from lightning_dhellam.commands.main import main
from lightning_dhellam.memory import Run
from lightning_dhellam.models import ModelConfig, preset
from lightning_dhellam.parallel import Cluster, Topology
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.search.cluster import Advice, Prediction
from lightning_dhellam.search.cluster.step import Visits
from lightning_dhellam.search.solve import Budget

H200 = Cluster.load("h200-64")
ASKED = Question(
    preset("llama-tiny"), 2, 8, 4, 128, schedules=("fold",), recomputes=("gathers", "full")
)


def advised(
    question: Question, cluster: Cluster, prune: bool, shown: int = 3, seconds: float = 0.0
) -> Advice:
    plans = PlanSearch(seconds, Budget(evaluations=200, rare_evaluations=20))
    return Adviser(question, Conditions(cluster), shown, plans=plans).advise(prune=prune)


def smaller(memory: float) -> Cluster:
    """A cluster of H200 with less memory."""
    assert H200.device is not None
    return replace(H200, device=replace(H200.device, memory=memory))


@pytest.mark.parametrize("memory", [141e9, 0.18e9], ids=["ample", "scarce"])
def test_pruning_loses_nothing(memory: float) -> None:
    """Against all choices, played one by one."""
    cluster = smaller(memory)
    pruned, full = (advised(ASKED, cluster, prune) for prune in (True, False))
    assert pruned.played < full.played == 16, "it prunes"
    assert full.played == len([*runs(ASKED, Counter())])
    seconds = [[one.prediction.seconds for one in found.candidates] for found in (pruned, full)]
    assert seconds[0] == pytest.approx(seconds[1])
    assert pruned.candidates[0].prediction.choice == full.candidates[0].prediction.choice
    for found in (pruned, full):
        assert found.looked_at == len(found.candidates) + sum(found.refused.values())
    assert all(one.prediction.fits for one in pruned.candidates)
    first, *others = pruned.candidates
    assert not first.reason and all("slower" in o.reason or o.reason == "as fast" for o in others)
    assert seconds[0] == sorted(seconds[0])


Measured = tuple[float, float, tuple[float, ...], float, float]


def bounded(config: ModelConfig, length: int, cluster: str) -> dict[str, Measured]:
    """Of every choice its bounds of seconds and bytes, and what was played and predicted."""
    schedules = ("fold", "1f1b", "zb-v")
    asked = Question(config, 2, 2, 2, length, schedules=schedules, recomputes=("gathers", "full"))
    conditions = Conditions(Cluster.load(cluster))
    every = [*runs(asked, Counter())]
    assert {run.schedule for run in every if run.topology.pp_size == 2} == {*schedules}
    visits: dict[object, Visits] = {}
    found: dict[str, Measured] = {}
    for run in every:
        one = Priceable.of(run, conditions, None)
        known = visits.setdefault((shape_of(run), run.micro_batch_size), {})
        least = least_time(one, known)
        step = one.play(BUILDERS, sketch=True, known=known)
        saved = tuple(use.peak for use in step.run.stages) if step.run else ()
        assert least.saved == pytest.approx(saved), "what is saved does not depend on times"
        taken = max(rank.total for rank in memory_of(run))
        size = _SURE * least_bytes(one, saved)
        found[str(choice_of(run))] = (least.seconds, step.seconds, saved, size, taken)
    return found


@pytest.mark.parametrize("cluster", ["h200-64", "a40-64"])
def test_no_step_is_shorter_and_no_rank_smaller_than_its_bound(cluster: str) -> None:
    """What pruning rests on, of every choice: with pipelines whose backwards are whole or halves,
    also of stages that hold two chunks, and of layers of which few are played."""
    found = bounded(preset("llama-tiny", num_layers=24), 128, cluster)
    for name, (least, seconds, _, size, taken) in found.items():
        assert least <= seconds * (1 + 1e-9), name
        assert size <= taken, name
    near = sum(least > 0.75 * seconds for least, seconds, *_ in found.values())
    assert near > len(found) / 2, "they are of use"


def test_bounds_that_were_a_fifth_larger_would_be_seen() -> None:
    """Where hardly anything but what they count takes time or memory: compute, links between two
    nodes, states of the optimizer, and activations."""
    found = bounded(preset("llama-3.1-8b", num_layers=4), 2048, "h200-64")
    for is_staged in (False, True):
        own = [row for name, row in found.items() if ("pp" in name) is is_staged]
        assert all(size <= taken for *_, size, taken in own)
        assert any(1.2 * size > taken for *_, size, taken in own)
        assert any(1.2 * least > seconds for least, seconds, *_ in own)


def test_the_best_get_plans_of_their_own_for_as_long_as_there_is_time() -> None:
    slow = Cluster.load("a40-64")
    asked = Question(preset("llama-tiny", num_layers=2), 2, 8, 2, 128, recomputes=("gathers",))
    asked = replace(asked, schedules=("fold",))
    quick, searched = (advised(asked, slow, True, seconds=s) for s in (0.0, 1e9))

    def by_choice(found: Advice) -> dict[str, Prediction]:
        return {str(one.prediction.choice): one.prediction for one in found.candidates}

    built_in, own = by_choice(quick), by_choice(searched)
    assert {*built_in} == {*own}
    assert all(own[name].seconds <= built_in[name].seconds * (1 + 1e-9) for name in own)
    assert any(own[name].seconds < built_in[name].seconds * 0.999 for name in own)
    assert any(one.plan == "auto" for one in own.values())
    assert all(set(one.plan.split(", ")) <= {*BUILDERS} for one in built_in.values())
    assert any("a searched one (auto)" in note for one in own.values() for note in one.notes)
    times = [one.prediction.seconds for one in searched.candidates]
    assert times == sorted(times)


def test_a_search_of_plans_ends_when_its_time_is_up() -> None:
    now = iter(range(0, 1000, 10))
    plans = PlanSearch(15.0, Budget(evaluations=1, rare_evaluations=1), lambda: float(next(now)))
    one = Priceable.of(next(runs(ASKED, Counter())), Conditions(H200), None)
    found = [plans.builders(one, key) for key in "abacab"]
    assert [builders is not None for builders in found] == [True, True, True, False, True, True]


def test_a_schedule_is_searched_where_that_makes_steps_shorter() -> None:
    config = preset("llama-tiny", num_layers=8)
    asked = Question(config, 2, 8, 2, 128, schedules=("fold", "auto"), recomputes=("gathers",))
    found = advised(asked, H200, True, 12, 1e9)
    every = [one.prediction for one in found.candidates]
    staged = [one for one in every if (one.choice.pp, one.choice.micro_batches) == (2, 2)]
    (auto,) = [one for one in staged if one.choice.schedule == "auto"]
    (fold,) = [one for one in staged if one.choice.schedule == "fold"]
    assert replace(fold.choice, schedule="auto") == auto.choice
    assert auto.seconds < fold.seconds
    assert any("schedule: the fastest of those with a name" in note for note in auto.notes)
    without = advised(replace(asked, schedules=("fold",)), H200, True, 12, 1e9)
    assert all(one.prediction.choice.schedule == "fold" for one in without.candidates)


def test_no_schedule_is_advised_that_was_not_asked_for() -> None:
    """Whether there is time to search one or not."""
    config = preset("llama-tiny", num_layers=8)
    asked = Question(config, 2, 8, 2, 128, schedules=("auto",), recomputes=("gathers",))
    for seconds in (0.0, 1e9):
        found = advised(asked, H200, True, 12, seconds)
        staged = [one.prediction for one in found.candidates if one.prediction.choice.pp == 2]
        assert {one.choice.schedule for one in staged} == {"auto"}
        assert all(any("schedule: the fastest of" in note for note in one.notes) for one in staged)
        assert found.looked_at == len(found.candidates) + sum(found.refused.values())


def test_eight_bits_are_a_choice_that_is_asked_for() -> None:
    config = preset("llama-3.1-8b", num_layers=2)
    asked = Question(config, 1, 8, 2, 4096, fp8=(None, "current"), recomputes=("gathers",))
    found = advised(asked, H200, True, 12)
    by_bits = {
        bits: [one.prediction for one in found.candidates if one.prediction.choice.fp8 == bits]
        for bits in ("", "current")
    }
    assert len(by_bits[""]) == len(by_bits["current"]) > 1
    for eight in by_bits["current"]:
        (sixteen,) = [one for one in by_bits[""] if one.choice == replace(eight.choice, fp8="")]
        assert 1.1 < sixteen.seconds / eight.seconds < 1.8
        assert eight.bytes != sixteen.bytes, "weights in 8 bits lie beside the others"
        assert "fp8 current" in str(eight.choice)
    assert found.best.choice.fp8 == "current"
    wide = replace(config, ffn_hidden_size=14344)
    refused: Counter[str] = Counter()
    assert all(run.fp8 is None for run in runs(replace(asked, config=wide), refused))
    assert [*refused] == ["have layers whose share is of no size for fp8='current'"]


def test_experts_are_spread_in_every_way_that_there_is() -> None:
    asked = Question(preset("moe-tiny"), 4, 8, 8, 128)
    every = [*topologies(asked)]
    assert {t.ep_size for t in every} == {1, 2, 4}
    assert {(t.tp_size, t.etp_size) for t in every} >= {(2, 1), (2, 2)}
    assert all(t.dp_size * t.tp_size * t.cp_size * t.pp_size == 4 for t in every)


def test_recipes_cut_experts_as_it_was_predicted() -> None:
    """Also where whole experts lie on ranks that share the rest of a layer."""
    asked = Question(preset("moe-tiny"), 4, 8, 8, 128)
    every = [*topologies(asked)]
    assert any(t.ep_size == t.etp_size == 1 < t.tp_size for t in every)
    for topology in every:
        run = run_of(asked, topology, 8 // topology.dp_size, 1, "fold", "full")
        best = SimpleNamespace(cluster="h200-64", device="NVIDIA H200", seconds=1.0)
        text = recipe_of(run, SimpleNamespace(model="moe-tiny"), {}, 8, best)  # type: ignore[arg-type]
        read = yaml.safe_load(text)["trainer"]["strategy"]["init_args"]
        names = ("tensor", "pipeline", "context", "expert", "expert_tensor")
        sizes = [read.get(f"{name}_parallel_size") for name in names]
        assert Topology(4, 0, *sizes) == replace(topology, rank=0)
        assert ("etp" in str(choice_of(run))) == (topology.etp_size != topology.tp_size)


def test_a_batch_that_cannot_be_shared_out_is_refused_with_the_nearest() -> None:
    asked = replace(ASKED, config=preset("llama-tiny", num_layers=3), ranks=64, global_batch=3)
    with pytest.raises(ValueError, match=r"--global-batch 3 cannot be shared out: .* use \d+ or"):
        [*runs(asked, Counter())]


def test_a_question_without_an_answer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    long = replace(ASKED, length=2048)
    with pytest.raises(ValueError, match=r"^sequence_length=2048 is longer than the model's max"):
        [*runs(long, Counter())]

    def refuse(run: Run) -> None:
        raise ValueError(f"tp {run.topology.tp_size} is refused")

    monkeypatch.setattr(Run, "check", refuse)
    with pytest.raises(ValueError, match=r"no way to cut 2 ranks .*: tp 2 is refused$"):
        [*runs(ASKED, Counter())]


def test_a_memory_that_nothing_fits_is_refused_with_the_least() -> None:
    with pytest.raises(ValueError, match=r"nothing fits: the least .* GiB \(.*more devices"):
        advised(ASKED, smaller(1e6), True)


def test_the_recipe_of_the_best_is_the_run_that_was_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_dhellam.commands import planned
    from lightning_dhellam.commands.fit import configuration
    from lightning_dhellam.commands.predict import plain, step_parser

    recipe = tmp_path / "best.yaml"
    words = ["--model", "llama-tiny", "--cluster", "h200-64", "--devices", "2"]
    file = tmp_path / "found.json"
    page = tmp_path / "page.html"
    written = ["--json", str(file), "--report", str(page), "--search_time", "0"]
    sizes = ["--global-batch", "2", "--sequence_length", "128", "--overrides", "{num_layers: 2}"]
    assert main(["advise", *words, *sizes, "--output", str(recipe), *written]) == 0
    out = capsys.readouterr().out
    assert "the best of" in page.read_text() and f"written to {page}" in out
    assert "why not" in out and f"dhellam fit --config {recipe}" in out
    options, rest = step_parser().parse_known_args(
        ["--cluster", "h200-64", "--config", str(recipe)]
    )
    read = configuration(rest)
    run: Run = plain(planned.run_of(read, options)[0], read["model"])
    (best, *_) = json.loads(file.read_text())["candidates"]
    assert asdict(choice_of(run)) == best["choice"] and run.length == best["length"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--cluster", "h2000-64"], "did you mean 'h200-64'?"),
        (["--model", "llama-tinny"], "llama-tiny"),
        (["--devices", "128"], "cluster 'h200-64' has 64: give at most 64"),
        (["--devices", "12"], "--devices 12 is no whole number of nodes of 8: give 8 or 16"),
        (["--output", "best.json"], "must end in .yaml"),
        (["--schedules", "fold", "zbv"], "--schedules zbv is not a known schedule: use 1f1b or"),
        (["--schedules", "zb-w"], "did you mean 'zb-v'?"),
        (["--fp8", "curent"], "error: --fp8 curent must be one of current, blockwise\n"),
        (["--fp8", "current", "--cluster", "a40-64"], "--fp8 current is not predicted on NVIDIA"),
        (["--fp8", "current", "--cluster", "a40-64"], "leave --fp8 out, take a cluster of NVIDIA"),
    ],
)
def test_mistakes_are_said_in_a_line(
    change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "llama-tiny", "--cluster", "h200-64", "--global-batch", "4", *change]
    assert main(["advise", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--search_time", "-1"], "--search_time: '-1' must be a number of at least 0"),
        (["--global-batch", "0"], "'0' must be a whole number of at least 1"),
    ],
)
def test_numbers_that_are_none_are_said_in_a_line(
    change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "llama-tiny", "--cluster", "h200-64", "--global-batch", "4", *change]
    with pytest.raises(SystemExit) as ended:
        main(["advise", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
