"""The best way to spread a model: nothing is lost by pruning, and what is found can be run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lightning_dhellam.advice import Adviser, Conditions, Question
from lightning_dhellam.advice.choices import run_of, runs, topologies
from lightning_dhellam.advice.predict import choice_of
from lightning_dhellam.commands.advise import recipe_of
from lightning_dhellam.commands.main import main
from lightning_dhellam.memory import Run
from lightning_dhellam.models import preset
from lightning_dhellam.parallel import Cluster, Topology
from lightning_dhellam.search.cluster import Advice

H200 = Cluster.load("h200-64")
ASKED = Question(
    preset("llama-tiny"), 2, 8, 4, 128, schedules=("fold",), recomputes=("gathers", "full")
)


def advised(question: Question, cluster: Cluster, prune: bool, shown: int = 3) -> Advice:
    return Adviser(question, Conditions(cluster), shown).advise(prune=prune)


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
    assert pruned.played + sum(pruned.refused.values()) >= pruned.looked_at
    assert all(one.prediction.fits for one in pruned.candidates)
    first, *others = pruned.candidates
    assert not first.reason and all("slower" in o.reason or o.reason == "as fast" for o in others)
    assert seconds[0] == sorted(seconds[0])


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
        best = SimpleNamespace(cluster="h200-64", seconds=1.0)
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
    written = ["--json", str(file)]
    sizes = ["--global-batch", "2", "--sequence_length", "128", "--overrides", "{num_layers: 2}"]
    assert main(["advise", *words, *sizes, "--output", str(recipe), *written]) == 0
    out = capsys.readouterr().out
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
    ],
)
def test_mistakes_are_said_in_a_line(
    change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "llama-tiny", "--cluster", "h200-64", "--global-batch", "4", *change]
    assert main(["advise", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
