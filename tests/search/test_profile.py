"""Profiles: measured once per kind of operator, stored whole, refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_dhellam.files import FileError
from lightning_dhellam.plan import STEP_PREFIX, Graph, Lane, Operator, Strand
from lightning_dhellam.search.measure import (
    BenchError,
    Profile,
    Samples,
    Target,
    Timing,
    Transfer,
    measure,
    merged,
    perturbed,
    spread,
    targets,
)
from lightning_dhellam.search.model import Costs
from tests.plan.graphs import no_launch
from tests.search.graphs import FINGERPRINT, FakeBench, costs, graphs_of, transformer


def _measured(slowdowns: bool = True) -> tuple[Profile, FakeBench, Costs]:
    graphs = graphs_of([transformer()])
    given = costs(graphs, 370e9, slowdowns)
    bench = FakeBench(given, spread=0.02)
    return measure(bench, graphs, FINGERPRINT), bench, given


def test_operators_that_do_the_same_work_are_measured_once() -> None:
    profile, bench, _ = _measured()
    forward, backward = graphs_of([transformer()])
    mine, other = profile.operators[forward.fingerprint], profile.operators[backward.fingerprint]
    assert mine["qkv.gather"] == mine["fc1.gather"] == other["fc1.regather"]
    assert mine["qkv.gather"] == "transformer/qkv.gather"
    assert mine["proj.scatter"] != mine["qkv.gather"]
    assert len({mine["fc1.gemm"], other["fc1.dgrad"], other["fc1.wgrad"]}) == 3
    assert len(bench.measured) == len(set(bench.measured)) == len(profile.lanes)


def test_operators_without_a_nominal_cost_are_not_taken_for_equal() -> None:
    forward = transformer().forward
    bare = replace(forward, operators=tuple(replace(o, cost=0.0) for o in forward.operators))
    assert len(targets([bare])[0]) == len(bare.operators)


def test_communication_is_measured_beside_every_compute_operator() -> None:
    profile, _, _ = _measured()
    lanes = profile.lanes
    beside = {
        (row.operator, row.partner)
        for row in profile.timings
        if row.partner and lanes[row.operator] is Lane.TP
    }
    tp = [key for key, lane in lanes.items() if lane is Lane.TP]
    compute = [key for key, lane in lanes.items() if lane is Lane.COMPUTE]
    assert beside == {(a, b) for a in tp for b in compute}


def test_costs_of_a_profile_are_those_of_the_machine() -> None:
    profile, _, given = _measured()
    found = Costs.of(profile)
    layer = transformer()
    for item in (layer.forward, layer.backward):
        for operator in item.operators:
            expected = given.alone(item, operator.name)
            assert found.alone(item, operator.name) == pytest.approx(expected)
    gather, gemm = "transformer/qkv.gather", "transformer/fc1.gemm"
    # 3.2 and 1.05 go in. Both are found, as the gather ends within the GEMM.
    assert found.slowdowns[gather, gemm] == pytest.approx((3.2, 1.05))


def test_what_starts_behind_is_measured_where_it_can_be() -> None:
    graphs = graphs_of([transformer()])
    given = costs(graphs, 370e9, slowdowns=True)
    given = replace(given, behind=dict.fromkeys(given.slowdowns, (9.0, 1.02)))
    lead = 20e-6
    profile = measure(FakeBench(given, spread=0.0, lead=lead), graphs, FINGERPRINT)
    found = Costs.of(profile)
    gather, gemm, norm = (
        f"transformer/{name}" for name in ("qkv.gather", "fc1.gemm", "attention.norm")
    )
    assert found.slowdowns[gather, gemm] == pytest.approx((3.2, 1.05))
    assert found.behind[gather, gemm] == pytest.approx((9.0, 1.02))
    assert found.alone(graphs[0], "attention.norm") < 2 * lead
    assert (gather, norm) in found.slowdowns and (gather, norm) not in found.behind
    leads = {row.operator: row.lead for row in profile.timings if row.lead and row.partner}
    assert leads[gemm] == pytest.approx(found.alone(graphs[0], "fc1.gemm") / 3), "well within it"
    swiglu = found.alone(graphs[0], "swiglu")
    assert leads["transformer/swiglu"] == max(lead, swiglu / 3)
    assert found.tables()[1][gather, norm] == found.slowdowns[gather, norm]
    assert measure(FakeBench(given), graphs, FINGERPRINT).timings == tuple(
        row
        for row in measure(FakeBench(given, lead=lead), graphs, FINGERPRINT).timings
        if not row.lead
    )


def test_a_failing_operator_is_named() -> None:
    graphs = graphs_of([transformer()])
    bench = FakeBench(costs(graphs, 370e9), broken="attention")
    with pytest.raises(BenchError, match="transformer/attention failed: out of memory"):
        measure(bench, graphs, FINGERPRINT)


def test_progress_comes_to_its_end() -> None:
    graphs = graphs_of([transformer()])
    seen: list[tuple[int, int, str]] = []
    measure(
        FakeBench(costs(graphs, 370e9)),
        graphs,
        FINGERPRINT,
        progress=lambda *now: seen.append(now),
        beside=lambda communication, compute: False,
    )
    assert seen[0] == (0, len(seen) - 1, "transformer/attention.norm")
    assert seen[-1] == (len(seen) - 1, len(seen) - 1, "done")


class _DisturbedBench(FakeBench):
    """Takes twice as long until it has timed `disturbed` operators."""

    def __init__(self, given: Costs, disturbed: int) -> None:
        super().__init__(given)
        self.disturbed = disturbed

    def alone(self, target: Target) -> Samples:
        found = super().alone(target)
        if len(self.measured) > self.disturbed:
            return found
        return Samples(tuple(2 * seconds for seconds in found.seconds))


def test_a_disturbance_is_outvoted_by_the_other_rounds() -> None:
    graphs = graphs_of([transformer()])
    given = costs(graphs, 370e9)
    once = measure(FakeBench(given), graphs, FINGERPRINT)
    disturbed = measure(_DisturbedBench(given, 5), graphs, FINGERPRINT)
    assert disturbed.timings[4].median == pytest.approx(2 * once.timings[4].median)
    bench = _DisturbedBench(given, 5)
    again = measure(bench, graphs, FINGERPRINT, rounds=3)
    assert [row.operator for row in again.timings] == [row.operator for row in once.timings]
    for row, undisturbed in zip(again.timings, once.timings, strict=True):
        # Of fifteen samples the five largest are not the middle one.
        assert row.median == pytest.approx(undisturbed.median, rel=0.03)
    assert len(bench.measured) == 3 * len(once.lanes)


def test_profiles_of_the_same_graphs_are_merged_into_their_medians() -> None:
    profile, _, _ = _measured()

    def scaled(factor: float) -> Profile:
        return replace(
            profile,
            timings=tuple(
                replace(row, median=row.median * factor, p20=row.p20 * factor, p80=row.p80 * factor)
                for row in profile.timings
            ),
        )

    assert merged([scaled(3.0), scaled(0.5), profile]) == profile
    lacking = replace(profile, timings=profile.timings[:-2])
    assert merged([profile, lacking, profile]).timings == profile.timings
    with pytest.raises(ValueError, match="measure at least one"):
        merged([])
    other = replace(profile, fingerprint=replace(FINGERPRINT, device="another"))
    with pytest.raises(ValueError, match=r"different conditions.*another"):
        merged([profile, other])


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    found, _, _ = _measured()
    profile = replace(found, transfers=(Transfer(0, 1, 8192.0, 1e-3, 1.5e-3, 0.2),))
    path = tmp_path / "runs" / "profile.json"
    profile.save(path)
    assert Profile.load(path, FINGERPRINT) == profile
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]
    assert '{"operator": "transformer/qkv.gather", "partner": null, "median":' in path.read_text()


def test_a_profile_of_before_knows_no_transfers(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile, _, _ = _measured()
    profile.save(path)
    fields = json.loads(path.read_text())
    assert fields.pop("transfers") == []
    path.write_text(json.dumps(fields))
    assert Profile.load(path, FINGERPRINT) == profile
    row = {"source": 0, "target": 1, "bytes": 8.0, "seconds": 0.0, "beside": 1.0}
    path.write_text(json.dumps({**fields, "transfers": [row]}))
    with pytest.raises(FileError, match=r"a transfer of 8\.0 bytes takes 0\.0 s"):
        Profile.load(path)


def test_a_profile_holds_its_graphs(tmp_path: Path) -> None:
    """All that is needed to plan and to simulate them comes back from the file."""
    graphs = graphs_of([transformer()])
    path = tmp_path / "profile.json"
    measure(FakeBench(costs(graphs, 370e9)), [*graphs, *graphs], FINGERPRINT).save(path)
    found = Profile.load(path).graphs
    assert found == tuple(graphs)
    for graph, before in zip(found, graphs, strict=True):
        assert graph.fingerprint == before.fingerprint
        assert graph.bytes_per_token == before.bytes_per_token
        assert [o.cost for o in graph.operators] == [o.cost for o in before.operators]
        with pytest.raises(AssertionError, match="read from a file"):
            graph.operators[0].run()


@pytest.mark.parametrize("inline", [False, True])
def test_costs_know_where_compute_ran(tmp_path: Path, inline: bool) -> None:
    graphs = graphs_of([transformer()])
    path = tmp_path / "profile.json"
    measure(FakeBench(costs(graphs, 370e9)), graphs, FINGERPRINT, inline=inline).save(path)
    assert Costs.of(Profile.load(path)).inline is inline


def test_a_graph_that_was_not_measured_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    _measured()[0].save(path)
    path.write_text(path.read_text().replace('"d_proj_full", "context"', '"d_proj_full", "qkv"'))
    with pytest.raises(FileError, match="graph 'transformer backward' is not the one"):
        Profile.load(path)


def test_a_profile_of_other_conditions_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    _measured()[0].save(path)
    shapes = {**FINGERPRINT.shapes, "micro_batch_size": 4}
    here = replace(
        FINGERPRINT, sizes={"world": 8, "tp": 4, "dp": 2}, shapes=shapes, dtype="float32"
    )
    with pytest.raises(FileError) as caught:
        Profile.load(path, here)
    text = str(caught.value)
    assert "tensor_parallel_size is 8 in the file and 4 here" in text
    assert "the number of data-parallel ranks is 1 in the file and 2 here" in text
    assert "; micro_batch_size is absent in the file and 4 here" in text
    assert "dtype is 'bfloat16' in the file and 'float32' here" in text
    assert "world" not in text


def test_half_a_profile_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    _measured()[0].save(path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="not a whole profile"):
        Profile.load(path)
    fields = json.loads(whole)
    fields["timings"] = fields["timings"][3:]
    path.write_text(json.dumps(fields))
    with pytest.raises(FileError, match=r"no time of 'transformer/"):
        Profile.load(path)
    path.write_text(json.dumps(fields | {"format": 99}))
    with pytest.raises(FileError, match="has format 99"):
        Profile.load(path)
    path.write_text("[]")
    with pytest.raises(FileError, match="is not a profile"):
        Profile.load(path)
    with pytest.raises(FileError, match="cannot be read"):
        Profile.load(tmp_path / "absent.json")


def test_a_profile_says_in_which_8_bits_an_operator_computes(tmp_path: Path) -> None:
    """One of an older version did not: it is refused, unless it is of none."""
    path = tmp_path / "profile.json"
    profile, _, _ = _measured()
    weights = f"{STEP_PREFIX}fc1.weight"
    cast = Operator("fc1.gemm", Lane.COMPUTE, ("x", weights), ("y",), no_launch, fp8="blockwise")
    graph = Graph("cast", Strand.FORWARD, (cast,), ("x",), ("y",))
    keys = {**profile.operators, graph.fingerprint: {cast.name: next(iter(profile.lanes))}}
    for graphs in (profile.graphs, (*profile.graphs, graph)):
        replace(profile, graphs=graphs, operators=keys).save(path)
        found = {o.name: o.fp8 for o in Profile.load(path).graphs[-1].operators}
        old = json.loads(path.read_text()) | {"format": 4}
        path.write_text(json.dumps(old))
        if graph in graphs:
            assert found == {"fc1.gemm": "blockwise"}
            with pytest.raises(FileError, match="measured in 8 bits by an older version"):
                Profile.load(path)
        else:
            assert not any(found.values()) and Profile.load(path).graphs == profile.graphs


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, _, _ = _measured()
    path = tmp_path / "profile.json"
    profile.save(path)

    def full_disk(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        replace(profile, launch=1.0).save(path)
    assert Profile.load(path) == profile
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_samples_are_summarised_by_quantiles() -> None:
    row = Timing.of("gemm", None, Samples((5.0, 1.0, 2.0, 4.0, 3.0, 100.0)))
    assert (row.median, row.p20, row.p80) == (3.5, 2.0, 5.0)
    with pytest.raises(ValueError, match="'gemm' beside 'gather' has no samples"):
        Timing.of("gemm", "gather", Samples(()))
    with pytest.raises(ValueError, match="positive"):
        Timing.of("gemm", None, Samples((1.0, -1.0)))


def test_perturbed_times_stay_within_their_spread() -> None:
    profile, _, _ = _measured()
    noisy = perturbed(profile, lambda: 0.25)
    for row, before in zip(noisy.timings, profile.timings, strict=True):
        assert before.p20 < row.median < before.median


def test_profiles_that_a_measurement_could_have_given_cover_its_spread() -> None:
    profile, _, _ = _measured()
    found = spread(profile, 4)
    assert found == spread(profile, 4)
    for number, row in enumerate(profile.timings):
        strata = sorted(
            (other.timings[number].median - row.p20) / (row.p80 - row.p20) for other in found
        )
        assert strata == pytest.approx([0.125, 0.375, 0.625, 0.875])
    orders = {
        tuple(sorted(range(4), key=lambda one, at=number: found[one].timings[at].median))
        for number in range(len(profile.timings))
    }
    assert len(orders) > 1


def test_a_profile_knows_what_leaves_processors_and_what_the_host_waits_for(tmp_path: Path) -> None:
    profile, _, _ = _measured()
    (first, *others) = profile.graphs
    operators = tuple(
        replace(o, shrinks=o.name.endswith("gemm"), waits=o.name.endswith("gather"))
        for o in first.operators
    )
    marked = replace(profile, graphs=(replace(first, operators=operators), *others))
    marked.save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json").graphs[0]
    assert [o.shrinks for o in loaded.operators] == [o.shrinks for o in operators]
    assert [o.waits for o in loaded.operators] == [o.waits for o in operators]
