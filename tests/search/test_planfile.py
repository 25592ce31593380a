"""Plan files: readable, complete, refused when stale or foreign."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dhellam.files import FileError
from lightning_dhellam.plan import BUILDERS, GraphPair, PlanError, kind_of
from lightning_dhellam.plan.file import PlanFile, builder_from
from lightning_dhellam.search.measure import Profile, measure
from lightning_dhellam.search.solve import Budget, solve
from tests.search.graphs import FINGERPRINT, FakeBench, costs, graphs_of, model

CONDITIONS = {"sizes": {"tp": 8}, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def layers() -> list[GraphPair]:
    return model(2)


@pytest.fixture(scope="module")
def made(layers: list[GraphPair]) -> PlanFile:
    graphs = graphs_of(layers)
    solved = solve(layers, costs(graphs, 110e9), budget=Budget(evaluations=200))
    return PlanFile.of(
        solved.plans,
        graphs,
        conditions=CONDITIONS,
        versions={"torch": "2.11"},
        notes={"predicted_ms": 12.5},
    )


def test_plans_come_back_from_their_file(
    made: PlanFile, layers: list[GraphPair], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    assert PlanFile.load(path, expected_conditions=CONDITIONS) == made
    build = builder_from(path, expected_conditions=CONDITIONS)
    for ahead in (None, *layers):
        for behind in (None, *layers):
            forward = ahead.forward if ahead else None
            backward = behind.backward if behind else None
            known = made.plans.get(kind_of(forward, backward))
            if known is not None:
                assert build(forward, backward) == known


def test_the_file_can_be_read_by_people(made: PlanFile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    text = path.read_text()
    assert '"plan auto: forward transformer, backward transformer",' in text
    assert str(made).startswith("plan auto: forward transformer, backward transformer\n  0  ")


def test_graphs_that_it_does_not_know_get_the_fallback(
    made: PlanFile, layers: list[GraphPair]
) -> None:
    logits = replace(layers[-1].forward, name="logits")
    assert made.builder()(logits, None).name == "interleaved"
    assert made.builder(BUILDERS["sequential"])(logits, None).name == "sequential"


def test_a_stale_file_is_refused(made: PlanFile, layers: list[GraphPair]) -> None:
    forward = layers[1].forward
    first, *rest = forward.operators
    changed = replace(forward, operators=(replace(first, name="new.norm"), *rest))
    with pytest.raises(
        FileError, match=rf"stale: its 'transformer forward'.*{changed.fingerprint}"
    ):
        made.builder()(changed, layers[1].backward)


def test_a_file_for_other_slots_made_again_is_refused(
    made: PlanFile, layers: list[GraphPair]
) -> None:
    backward = replace(layers[1].backward, name="transformer+full")
    message = "is for transformer backward, and the model has 'transformer\\+full backward'"
    with pytest.raises(FileError, match=message):
        made.builder()(layers[1].forward, backward)


def test_a_foreign_file_is_refused(made: PlanFile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    with pytest.raises(FileError, match="tensor_parallel_size is 8 in the file and 2 here"):
        PlanFile.load(path, expected_conditions={"sizes": {"tp": 2}, "dtype": "bfloat16"})


def test_a_broken_file_is_refused(made: PlanFile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    fields = json.loads(path.read_text())
    path.write_text(path.read_text()[:-40])
    with pytest.raises(FileError, match="not a whole plan file"):
        PlanFile.load(path)
    del fields["graphs"]
    path.write_text(json.dumps(fields))
    with pytest.raises(FileError, match="'graphs'"):
        PlanFile.load(path)
    path.write_text('{"format": 1, "plans": [{"forward": "", "backward": "", "table": ["plan"]}]}')
    with pytest.raises(FileError, match="cannot be read: not a plan"):
        PlanFile.load(path)


def test_a_profile_and_a_plan_file_are_not_taken_for_each_other(
    made: PlanFile, layers: list[GraphPair], tmp_path: Path
) -> None:
    graphs = graphs_of(layers)
    profile, plan = tmp_path / "p.json", tmp_path / "q.json"
    measure(FakeBench(costs(graphs, 110e9)), graphs, FINGERPRINT).save(profile)
    made.save(plan)
    with pytest.raises(FileError, match=r"p\.json is a profile, but a plan file is wanted"):
        PlanFile.load(profile)
    with pytest.raises(FileError, match=r"q\.json is a plan file, but a profile is wanted"):
        Profile.load(plan)


def test_an_edited_plan_that_cannot_run_is_refused_with_an_arrow(
    made: PlanFile, layers: list[GraphPair], tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    made.save(path)
    fields = json.loads(path.read_text())
    fields["plans"][0]["table"].pop()
    path.write_text(json.dumps(fields))
    with pytest.raises(PlanError, match="<--"):
        builder_from(path)(layers[1].forward, layers[1].backward)
