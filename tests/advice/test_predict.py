"""Steps on clusters: pure functions of a run, a cluster and a profile that was stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_dhellam.advice import Conditions, memory_of, predict, work_of
from lightning_dhellam.advice.priceable import Priceable
from lightning_dhellam.bench.several import predicted
from lightning_dhellam.bench.several.predicted import besides, verdict
from lightning_dhellam.bench.shard import shard_profile
from lightning_dhellam.commands.main import main
from lightning_dhellam.memory import Run
from lightning_dhellam.memory import predict as predict_memory
from lightning_dhellam.models import preset
from lightning_dhellam.parallel import Cluster, Topology
from lightning_dhellam.plan import BUILDERS, Graph, Lane, Operator
from lightning_dhellam.search.cluster import Prediction, Priced, Pricing, step
from lightning_dhellam.search.cluster.beginning import beginning
from lightning_dhellam.search.cluster.pricing import REAL, Price
from lightning_dhellam.search.measure import Profile, Timing
from lightning_dhellam.search.model import Costs, Walk, simulate
from lightning_dhellam.search.pipeline import layers_of
from lightning_dhellam.search.solve import Budget

FOLDER = Path(__file__).parents[2] / "benchmarks/multi_gpu"
PROFILE = FOLDER / "a8-tp2-nvidia-h200-2026-11-25/profile.json"
MEASURED = FOLDER / "several-2-nvidia-h200-2026-11-25.json"
DEEP = preset("llama-tiny", num_layers=12)
H200, A40 = Cluster.load("h200-64"), Cluster.load("a40-64")
DERIVED = Conditions(H200, model="llama-tiny")
HALF = {Lane.PP: 2.0}


def tiny(world: int = 8, samples: int = 8, **fields: object) -> Run:
    """Twelve narrow layers; sizes by their short names."""
    sizes = {name: fields.pop(name) for name in ("tp_size", "pp_size", "cp_size") if name in fields}
    topology = Topology(world_size=world, **sizes)  # type: ignore[arg-type]
    return Run(DEEP, topology, samples, 128, **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def known() -> Conditions:
    return Conditions(H200, Profile.load(PROFILE))


def wide(**fields: object) -> Run:
    """The run whose profile is stored."""
    config = preset("llama-3-70b", num_layers=8, vocab_size=32000)
    return Run(config, Topology(world_size=2, tp_size=2), 4, 8192, **fields)  # type: ignore[arg-type]


def whole(found: Prediction) -> list[float]:
    """Seconds of all that each stage does."""
    parts = ("compute", "exposed", "transfer", "bubble", "reduction", "optimizer")
    return [sum(getattr(stage, part) for part in parts) for stage in found.stages]


def test_what_was_profiled_is_played_as_the_search_plays_it(known: Conditions) -> None:
    assert known.profile is not None
    costs = Costs.of(known.profile)
    costs = replace(costs, seconds={k: REAL * s for k, s in costs.seconds.items()}, samples=())
    build = BUILDERS["interleaved"]
    step = simulate(layers_of(known.profile, 8), build, costs, micro_batches=4)
    found = predict(wide(), known)
    assert found.seconds - found.stages[0].optimizer == pytest.approx(step.seconds, rel=2e-3)
    assert found.origins["measured"] > 0.99 * sum(found.origins.values())
    assert found.low < found.seconds < found.high
    assert found.high / found.low < 1.12, "the bars of what is measured are narrow"


def test_real_steps_on_two_gpus_are_predicted_from_the_profile_of_one_of_them(
    known: Conditions,
) -> None:
    """Of another width and other micro-batches as well, which no profile has seen."""
    report = json.loads(MEASURED.read_text())
    real = [row for row in report["rows"] if "tp2 pp1" in row["case"]]
    report["rows"] = [row | {"peak GiB": None} for row in real if row["plan"] == "interleaved"]
    found = [*besides(report, known, 32000)]
    assert len(found) == 2 and {row.name[0] for row in found} == {"a", "b"}
    assert max(abs(row.error) for row in found) < 0.02
    assert all(row.low < row.measured < row.high for row in found)
    assert verdict(found)[0] == "2 of 2 steps are predicted within 5%"


def test_collectives_of_another_kind_have_wider_bars_than_those_a_link_was_measured_with(
    known: Conditions,
) -> None:
    """The profile has gathers and scatters between two ranks: an all-to-all goes other ways."""
    experts = preset("phi-3.5-moe", num_layers=2)
    run = Run(experts, Topology(world_size=4, tp_size=2, ep_size=2), 1, 4096)
    prices = Priceable.of(run, known, known.known()).priced.prices
    scatter, dispatch = (
        prices[f"mixture forward/experts.{name}"] for name in ("scatter", "dispatch")
    )
    assert scatter.origin == dispatch.origin == "scaled"
    assert scatter.high / scatter.seconds == pytest.approx(1.07)
    assert dispatch.high / dispatch.seconds == pytest.approx(1.15)


def test_the_bars_of_a_step_up_to_its_last_gradient_are_as_wide_as_its_own(
    monkeypatch: pytest.MonkeyPatch, known: Conditions
) -> None:
    """What a measured step leaves out, the optimizer, is as uncertain as the rest."""
    choice = SimpleNamespace(micro_batches=4)
    stages = (SimpleNamespace(optimizer=2.0),)
    step = SimpleNamespace(seconds=10.0, low=5.0, high=20.0, stages=stages, choice=choice)
    monkeypatch.setattr(predicted, "predict", lambda run, conditions: step)
    row = {"side": "ours", "case": "a8 tp2 pp1", "plan": "dhellam", "layers": 8, "step ms": 7.0}
    (found,) = besides({"rows": [row]}, known, 32000)
    assert (found.low, found.predicted, found.high) == pytest.approx((4.0, 8.0, 16.0))


def test_a_device_without_a_profile_has_wider_bars(known: Conditions) -> None:
    found, derived = (
        predict(wide(), replace(known, cluster=A40, profile=p)) for p in (known.profile, None)
    )
    for one in (found, derived):
        assert one.high / one.low > 1.2 and one.device == "NVIDIA A40"
        assert set(one.origins) <= {"derived", "modelled"}
    assert found.seconds == pytest.approx(derived.seconds, rel=0.1), "an H200 is as its sheet says"
    assert "derived for NVIDIA A40 from data sheets" in found.notes[0]


@pytest.mark.parametrize("sizes", [{}, {"pp_size": 2}, {"tp_size": 2, "pp_size": 4}])
def test_the_parts_of_a_step_add_up(sizes: dict[str, int]) -> None:
    found = predict(tiny(**sizes), DERIVED)
    assert whole(found) == pytest.approx([found.seconds] * found.choice.pp)
    assert found.choice.ranks == sum(stage.ranks for stage in found.stages) == 8
    assert found.tokens_per_second == pytest.approx(found.choice.global_batch * 128 / found.seconds)
    assert found.lanes["compute"].exposed == 0.0 < found.lanes["compute"].busy
    assert {*found.lanes} == {"compute"} | {
        n for n in ("tp", "pp", "dp") if getattr(found.choice, n) > 1
    }
    assert json.loads(json.dumps(found.as_values()))["bubble"] == pytest.approx(found.bubble)


@pytest.mark.parametrize(
    "sizes", [{"tp_size": 2}, {"tp_size": 2, "pp_size": 2, "recompute": "full"}]
)
def test_few_layers_tell_of_many_that_are_alike(sizes: dict[str, object]) -> None:
    run = tiny(4, 4, **sizes)
    assert predict(run, DERIVED, sketch=True).seconds == pytest.approx(
        predict(run, DERIVED).seconds, rel=0.01
    )
    deep = replace(run, config=replace(run.config, num_layers=16))
    for quick, exact in zip(memory_of(deep), predict_memory(deep), strict=True):
        assert quick.stage == exact.stage and quick.total == pytest.approx(exact.total, rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "length", "sizes"),
    [(16, 1024, {}), (8, 8192, {}), (32, 4096, {"tp_size": 4})],
    ids=["exposed", "hidden", "exposed late, with tp"],
)
def test_few_layers_tell_of_the_reduction_behind_many(
    layers: int, length: int, sizes: dict[str, int]
) -> None:
    """Also where the layers that are played hide what the others do not, or the other way."""
    config = preset("llama-3.1-8b", num_layers=layers)
    run = Run(config, Topology(world_size=64, **sizes), 1, length)
    few, all_ = (predict(run, Conditions(A40), sketch=sketch) for sketch in (True, False))
    assert few.seconds == pytest.approx(all_.seconds, rel=0.005)
    assert few.stages[0].reduction == pytest.approx(all_.stages[0].reduction, rel=0.02)


@pytest.mark.parametrize("sizes", [{}, {"pp_size": 2}], ids=["alone", "staged"])
def test_thousands_of_ranks_are_played_as_often_as_a_few(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal ranks are one: neither lowering nor machine model knows how many there are."""
    counted: Counter[str] = Counter()
    play, price = Walk.play, Pricing.price

    def plays(self: Walk, *given: Any) -> Any:
        counted["walks"] += 1
        return play(self, *given)

    def prices(self: Pricing, graphs: Iterable[Graph]) -> Priced:
        known = [*graphs]
        counted["graphs"] += len(known)
        return price(self, known)

    monkeypatch.setattr(Walk, "play", plays)
    monkeypatch.setattr(Pricing, "price", prices)
    huge = replace(DERIVED, cluster=replace(H200, world_size=65536))
    found = {}
    for world in (16, 65536):
        counted.clear()
        predict(tiny(world, tp_size=2, **sizes), huge, sketch=True)
        found[world] = dict(counted)
    assert found[16] == found[65536], "four thousand times as many ranks"
    assert found[16]["graphs"] == 6, "embedding, layer and head, each in both directions"
    assert 0 < found[16]["walks"] < 1000


def test_stages_that_are_alike_are_played_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper pipelines have more stages, not more kinds of visits to play."""
    counted: Counter[int] = Counter()
    play = Walk.play

    def plays(self: Walk, *given: Any) -> Any:
        counted[stages] += 1
        return play(self, *given)

    monkeypatch.setattr(Walk, "play", plays)
    config = preset("llama-tiny", num_layers=64)
    for stages in (4, 8):
        # As many layers to a chunk, and micro-batches to a stage.
        few = replace(config, num_layers=8 * stages)
        topology = Topology(world_size=stages, pp_size=stages)
        predict(
            Run(few, topology, 2 * stages, 128, split=(4,) * (2 * stages)), DERIVED, sketch=True
        )
    assert counted[8] == counted[4] > 0


def test_thousands_of_ranks_are_as_many_kinds_as_a_few() -> None:
    huge = replace(DERIVED, cluster=replace(H200, world_size=4096))
    found = predict(tiny(4096, tp_size=2, pp_size=2), huge)
    few = predict(tiny(8, tp_size=2, pp_size=2), huge)
    assert [stage.ranks for stage in found.stages] == [2048, 2048]
    assert (found.lanes["dp"].level, few.lanes["dp"].level) == ("between", "inside")
    assert found.lanes["dp"].busy > few.lanes["dp"].busy
    assert found.stages[0].compute == pytest.approx(few.stages[0].compute)


@pytest.mark.parametrize("stages", [1, 2])
def test_stragglers_and_slower_networks_cost_time(stages: int) -> None:
    run = tiny(8, tp_size=2, pp_size=stages)
    usual = predict(run, DERIVED)
    late = predict(run, replace(DERIVED, straggler=2.0))
    assert usual.seconds < late.seconds < 2 * usual.seconds
    times = [b.compute / a.compute for a, b in zip(usual.stages, late.stages, strict=True)]
    expected = pytest.approx([2.0, 1.0][:stages], rel=0.05)
    assert times == expected, "all wait for it, and none other is slower"
    assert "one rank of stage 0 computes 2 times slower" in late.notes
    wide, wider = (found.high / found.low for found in (usual, late))
    assert wider > 0.9 * wide > 1.1, "what a straggler takes is as uncertain"
    slow = predict(run, replace(DERIVED, slower={Lane.DP: 1000.0}))
    assert slow.lanes["dp"].busy > 10 * usual.lanes["dp"].busy and slow.seconds > usual.seconds
    assert slow.lanes["tp"].busy == usual.lanes["tp"].busy


def test_a_slower_network_between_stages_is_slower_than_was_measured(known: Conditions) -> None:
    """Also where a profile of two ranks has measured the link that two stages have."""
    topology = Topology(world_size=2, pp_size=2)
    run = replace(wide(plan="megatron"), topology=topology)
    usual, slow = (
        Priceable.of(run, one, one.known()).link for one in (known, replace(known, slower=HALF))
    )
    assert usual is not None and slow is not None and usual.bandwidth != 370e9, "as measured"
    assert slow.bandwidth == pytest.approx(usual.bandwidth / 2)


@pytest.mark.parametrize(("lane", "sizes"), [("dp", {}), ("pp", {"pp_size": 4, "world": 4})])
def test_networks_are_as_uncertain_as_their_file_says(lane: str, sizes: dict[str, int]) -> None:
    """What replicas add up and what stages send are no operators, and have bars like them."""
    found = {}
    for error in (0.0, 0.9):
        assert A40.networks is not None and A40.networks.between is not None
        inside, between = (
            replace(network, error=error, bandwidth=network.bandwidth / 1000)
            for network in (A40.networks.inside, A40.networks.between)
        )
        networks = replace(A40.networks, inside=inside, between=between)
        cluster = replace(A40, networks=networks)
        found[error] = predict(tiny(**sizes), Conditions(cluster), sketch=True)
    sure, unsure = found[0.0], found[0.9]
    assert unsure.seconds == sure.seconds < 2 * unsure.lanes[lane].exposed
    assert unsure.high / sure.high > 1.3 and unsure.low / sure.low < 0.7


@pytest.mark.parametrize("stages", [1, 2])
def test_the_timeline_of_a_searched_plan_is_that_of_the_fastest_one(stages: int) -> None:
    run = tiny(8, tp_size=4, pp_size=stages, plan="auto")
    found = predict(run, Conditions(A40), sketch=True)
    together = [set() for _ in range(2)]
    for own in found.intervals:
        together[own.lane is Lane.COMPUTE].add((own.start, own.end))
    talks, computes = together
    hidden = [any(a < y and x < b for x, y in computes) for a, b in talks]
    assert any(hidden), "of the sequential order nothing would be beside something else"


@pytest.mark.parametrize("stages", [1, 2])
def test_a_plan_is_searched_for_a_prediction(stages: int) -> None:
    """It is among the built-in ones, and its timeline is the one that is shown if it is faster."""
    run = Run(
        preset("llama-3.2-1b", num_layers=12),
        Topology(world_size=4 * stages, tp_size=4, pp_size=stages),
        4,
        1024,
        plan="auto",
    )
    usual, found = (
        predict(run, Conditions(A40), sketch=True, search=budget) for budget in (None, Budget(200))
    )
    assert found.seconds < usual.seconds and "auto" in found.plan.split(", ")
    assert any("a searched one (" in note for note in found.notes)
    assert list(found.plans.values()) != list(usual.plans.values())
    assert predict(replace(run, plan="megatron"), Conditions(A40), search=Budget(1)).plan == (
        "megatron"
    )


def test_numbers_of_four_bytes_take_longer(known: Conditions) -> None:
    """By a data sheet as from a profile of bf16; fp16 takes as long as bf16."""
    conditions = replace(known, profile=None), known
    for one in conditions:
        half, sixteen, full = (
            predict(wide(precision=name), one, sketch=True)
            for name in ("bf16-mixed", "16-mixed", "32-true")
        )
        assert sixteen.seconds == half.seconds
        assert full.seconds > 8 * half.seconds, "989 TFLOP/s against 67"
        assert 0 < full.mfu < 1 and full.origins["derived"] > 0.9 * sum(full.origins.values())
    device = replace(H200.device, flops_fp32=None)  # type: ignore[type-var]
    old = replace(known, cluster=replace(H200, device=device))
    with pytest.raises(ValueError, match="add `flops_fp32` under `device` in the cluster file"):
        predict(wide(precision="32-true"), old)


def test_another_device_is_not_disturbed_as_the_measured_one_is(known: Conditions) -> None:
    priced = Priceable.of(wide(), replace(known, cluster=A40), known.known()).priced
    (own,) = set(priced.costs.slowdowns.values())
    assert own[1] == pytest.approx(84 / 80), "4 of 84 multiprocessors are taken"
    assert not priced.costs.behind


def test_a_shard_is_measured_on_the_device_at_hand() -> None:
    """One rank's layer, alone; its links are modelled."""
    run = Run(preset("llama-tiny"), Topology(world_size=8, tp_size=2), 1, 32, precision="32-true")
    profile = shard_profile(run, H200, torch.device("cpu"), repeats=1)
    assert (
        profile.fingerprint.sizes["tp"] == 2 and ", emulated cluster" in profile.fingerprint.device
    )
    assert H200.device is not None
    name = profile.fingerprint.device.partition(", emulated cluster")[0]
    here = replace(H200, device=replace(H200.device, name=name))
    found = predict(run, Conditions(here, profile))
    computed = sum(found.origins.get(origin, 0.0) for origin in ("scaled", "derived"))
    assert found.origins["measured"] > 9 * computed and found.origins["modelled"] > 0


def test_more_ranks_than_the_cluster_has_are_refused() -> None:
    with pytest.raises(ValueError, match="128 ranks, but cluster 'h200-64' has 64: use"):
        predict(tiny(128), DERIVED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fp8": "curent"}, "fp8='curent' must be one of current, blockwise, or None"),
        ({"fp8": "current", "precision": "32-true"}, "fp8='current' casts activations of 16 bits"),
        ({"length": 2048}, "sequence_length=2048 is longer than"),
        ({"length": 127}, "sequence_length=127 is not a multiple of tensor_parallel_size=2"),
    ],
)
def test_a_run_that_is_not_predicted_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(replace(tiny(tp_size=2), **fields), DERIVED)  # type: ignore[arg-type]


def test_eight_bits_are_refused_where_the_device_has_none() -> None:
    with pytest.raises(ValueError, match=r"not predicted on NVIDIA A40, .* leave fp8 out, take"):
        predict(replace(tiny(tp_size=2), fp8="current"), Conditions(A40))


def test_products_in_8_bits_are_derived_from_those_in_16(known: Conditions) -> None:
    """Faster by their ratio, with wider bars; what is not cast is as it was."""
    sixteen, eight = (predict(wide(fp8=fp8), known) for fp8 in (None, "current"))
    assert 1.15 < sixteen.seconds / eight.seconds < 1.6
    assert eight.origins["derived"] > 0.3 * sum(eight.origins.values())
    assert eight.origins["measured"] > 0.2 * sum(eight.origins.values()), "attention, norms, links"
    bars = [one.high / one.low for one in (sixteen, eight)]
    assert bars[1] > bars[0]
    assert any("products are derived, 1.8 times as fast" in note for note in eight.notes)


def prices_of(run: Run, conditions: Conditions) -> Mapping[str, Price]:
    return Priceable.of(run, conditions, conditions.known()).priced.prices


GEMM, WGRAD, CAST = (
    f"transformer {name}" for name in ("forward/fc1.gemm", "backward/fc1.wgrad", "forward/fc1.cast")
)


def test_a_device_is_as_much_faster_in_8_bits_as_its_sheet_says(known: Conditions) -> None:
    """Formats differ, and so do gradients of weights, as they do on an H200, whose sheet says 2."""
    assert H200.device is not None and H200.device.flops_fp8 is not None
    half = replace(H200.device, flops_fp8=H200.device.flops_fp8 / 2)
    slow = replace(H200, device=half)
    for one in (known, replace(known, profile=None)):
        bits = {fp8: prices_of(wide(fp8=fp8), one) for fp8 in (None, "current", "blockwise")}
        gains = {
            (fp8, name): bits[None][name].seconds / bits[fp8][name].seconds
            for fp8 in ("current", "blockwise")
            for name in (GEMM, WGRAD)
        }
        assert gains == pytest.approx(
            {
                ("current", GEMM): 1.8,
                ("current", WGRAD): 1.8,
                ("blockwise", GEMM): 1.68,
                ("blockwise", WGRAD): 1.37,
            },
            rel=1e-2,
        )
        slower = prices_of(wide(fp8="current"), replace(one, cluster=slow))
        for name in (GEMM, WGRAD):
            assert slower[name].seconds == pytest.approx(2 * bits["current"][name].seconds)
        assert slower[CAST] == bits["current"][CAST], "bytes are moved as fast"


def test_a_profile_in_one_format_of_8_bits_has_not_measured_the_other(known: Conditions) -> None:
    assert known.profile is not None
    graphs = tuple(
        replace(graph, operators=tuple(map(_in_current, graph.operators)))
        for graph in known.profile.graphs
    )
    eight = replace(known, profile=replace(known.profile, graphs=graphs))
    same, other, none = (prices_of(wide(fp8=fp8), eight) for fp8 in ("current", "blockwise", None))
    assert same[GEMM].origin == same[WGRAD].origin == "measured"
    assert same[GEMM].high < same[GEMM].seconds * 1.1
    for prices, gain in ((other, 1.68), (none, 1.0)):
        assert prices[GEMM].origin == "derived"
        assert prices[GEMM].seconds == pytest.approx(same[GEMM].seconds * 1.8 / gain, rel=1e-3)
        assert prices[GEMM].high == pytest.approx(prices[GEMM].seconds * 1.15)


def _in_current(operator: Operator) -> Operator:
    """The same, as if it had been measured in 8 bits; its time is left as it is."""
    if operator.name.rpartition(".")[2] not in ("gemm", "dgrad", "wgrad"):
        return operator
    return replace(operator, fp8="current", cost=operator.cost / 1.8)


def test_saved_slots_are_copied_over_the_link_to_the_host(known: Conditions) -> None:
    """By the cluster's file, or as the profile has measured it; and there is less to hold."""
    run = wide(offload=["x"], recompute="full")
    bare = predict(replace(run, offload=None), known, sketch=True)
    found = predict(run, known, sketch=True)
    assert H200.networks is not None and H200.networks.host is not None
    # Layers and head, micro-batches, tokens, a rank's share of their states.
    size = 9 * 4 * 8192 * (8192 * 2 / 2)
    for lane in ("offload", "fetch"):
        assert found.lanes[lane].busy == pytest.approx(REAL * size / 50e9, rel=0.01)
    assert found.seconds > bare.seconds and found.lanes["offload"].level == ""
    assert "offload x" in str(found.choice) and "offload" not in str(bare.choice)
    name = "transformer+full+offload forward/x.offload"
    usual, slow, measured = (
        prices_of(run, one)[name]
        for one in (known, replace(known, slower={Lane.OFFLOAD: 2.0}), _copied(known, run))
    )
    assert usual.origin == "modelled" and usual.high == pytest.approx(1.2 * usual.seconds)
    assert slow.seconds == pytest.approx(2 * usual.seconds)
    assert measured.origin == "measured" and measured.seconds == pytest.approx(REAL * 0.25)
    more = prices_of(replace(run, micro_batch_size=2), _copied(known, run))[name]
    assert more.origin == "scaled" and more.seconds == pytest.approx(2 * measured.seconds)
    every = replace(run, offload="all", recompute="none")
    other = prices_of(every, _copied(known, run))
    copies = {key: price for key, price in other.items() if key.endswith("lse.offload")}
    assert copies and {price.origin for price in copies.values()} == {"scaled"}
    alone = replace(H200, networks=replace(H200.networks, host=None))
    with pytest.raises(ValueError, match="add `host` with its bandwidth under `networks`"):
        predict(run, replace(known, cluster=alone))
    with pytest.raises(ValueError, match="offload names 'z', which no layer has"):
        predict(replace(run, offload=["z"]), known)


def test_what_a_run_will_choose_to_copy_is_not_known_before(known: Conditions) -> None:
    run = wide(offload="auto", recompute="auto")
    bare_run = replace(run, offload=None)
    bare, found = (predict(one, known, sketch=True) for one in (bare_run, run))
    assert found.seconds == bare.seconds and memory_of(run) == memory_of(bare_run)
    said = "offload='auto' is taken to leave all on the device; it may copy some"
    assert said in found.notes and said not in bare.notes
    assert "offload auto" in str(found.choice)


def _copied(known: Conditions, run: Run) -> Conditions:
    """The same with a profile in which copies of a run have been measured: a quarter of a
    second each."""
    assert known.profile is not None
    graphs = [work_of(run).layers[1].forward]
    keys = {g.fingerprint: {o.name: f"{g}/{o.name}" for o in g.operators} for g in graphs}
    rows = [Timing(key, None, 0.25, 0.24, 0.27) for own in keys.values() for key in own.values()]
    lanes = {keys[g.fingerprint][o.name]: o.lane for g in graphs for o in g.operators}
    old = known.profile
    profile = replace(
        old,
        operators={**old.operators, **keys},
        lanes={**old.lanes, **lanes},
        timings=(*old.timings, *rows),
        graphs=(*old.graphs, *graphs),
    )
    return replace(known, profile=profile)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_straggler_casts_and_optimizes_slower_as_well(
    stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a rank does, and not its operators alone."""
    run = wide(fp8="current")
    run = replace(run, topology=replace(run.topology, pp_size=stages, world_size=2 * stages))
    with_casts, without = {}, {}
    for times in (1.0, 2.0):
        conditions = replace(DERIVED, straggler=times)
        with_casts[times] = predict(run, conditions, sketch=True)
        with monkeypatch.context() as patched:
            patched.setattr(step, "beginning", lambda work, machine: 0.0)
            without[times] = predict(run, conditions, sketch=True).seconds
    usual, late = (with_casts[times].seconds - without[times] for times in (1.0, 2.0))
    assert late == pytest.approx(2 * usual) and usual > 0
    ends = [with_casts[times].stages[0].optimizer for times in (1.0, 2.0)]
    assert ends[1] == pytest.approx(2 * ends[0]) and ends[0] > 0


def test_casts_of_weights_are_once_a_step(known: Conditions) -> None:
    run = replace(wide(fp8="current"), samples=8)
    work = work_of(run)
    layers = sum(bool(pair.forward.preparation) for pair in work.layers)
    assert layers == 8
    seconds = beginning(work, known.machine)
    weights = sum(one.dense for one in work.weights[1:-1])
    moved = seconds * 0.83 * known.device.bandwidth
    assert moved == pytest.approx(6 * weights, rel=0.01), "two bytes read, two times two written"
    assert beginning(work_of(wide()), known.machine) == 0.0


def test_a_schedule_that_is_to_be_searched_is_searched() -> None:
    """It is never behind those with a name, whose layers lie as its own do."""
    fields = {"tp_size": 2, "pp_size": 2}
    named = {
        name: predict(tiny(4, 6, **fields, schedule=name), DERIVED).seconds
        for name in ("fold", "zb-v", "dualpipe-v")
    }
    found = predict(tiny(4, 6, **fields, schedule="auto"), DERIVED)
    assert found.seconds <= min(named.values()) * 1.001 and found.choice.schedule == "auto"
    assert any("schedule: the fastest of those with a name" in note for note in found.notes)
    assert whole(found) == pytest.approx([found.seconds] * 2)


@pytest.mark.parametrize("by", ["the run's limit", "the device's memory"])
def test_a_schedule_is_searched_within_the_memory_that_there_is(by: str) -> None:
    """Also if nobody has said what the stages take."""
    run = tiny(2, 8, pp_size=2, schedule="auto")
    free = predict(run, DERIVED)
    limit = (free.bytes - 10e6) / 0.97
    assert H200.device is not None
    small = replace(H200, device=replace(H200.device, memory=limit))
    if by == "the run's limit":
        found = predict(replace(run, memory_limit=int(limit)), DERIVED)
    else:
        found = predict(run, replace(DERIVED, cluster=small))
    assert found.bytes <= 0.97 * limit < free.bytes


def test_a_cluster_of_links_is_refused_with_those_that_say_more() -> None:
    with pytest.raises(ValueError, match=r"'h200-node' does not say what it is built of.*a40-64"):
        Conditions(Cluster.load("h200-node"))


def test_the_command_prints_and_writes_a_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    words = ["--config", "llama-tiny-pp2-2cpu", "--cluster", "h100-64", "--json", str(file)]
    page = file.with_name("report.html")
    trace = file.with_name("trace.json")
    words += ["--report", str(page), "--trace", str(trace)]
    assert main(["predict", *words, "--slower", "pp=2"]) == 0
    out = capsys.readouterr().out
    assert "llama-tiny on h100-64: 2 × NVIDIA H100 80GB HBM3, pp 2, 8 × 1, zb-v" in out
    assert "the network of lane pp is 2 times slower" in out and "fits" in out
    found = json.loads(file.read_text())
    assert found["choice"]["pp"] == 2
    events = json.loads(trace.read_text())["traceEvents"]
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(named.values()) == {"compute", "stage 0", "stage 1"}
    visits = [e for e in events if e["pid"] == 2 and e["ph"] == "X"]
    assert {e["name"] for e in visits} > {"0F0", "optimizer"}
    assert max(e["ts"] + e["dur"] for e in visits) == pytest.approx(found["seconds"] * 1e6)
    assert (
        "llama-tiny on h100-64" in page.read_text() and "the stages of a step" in page.read_text()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "llama-tiny-2cpu", "--cluster", "h20-64"], "error: --cluster 'h20-64' is"),
        (["--config", "llama-tiny-2cpu", "--cluster", "h20-64"], "did you mean 'h200-64'?"),
        (["--cluster", "h200-64"], "predict needs --config FILE"),
        (["--config", "none.yaml", "--cluster", "h200-64", "--measure"], "needs --profile FILE"),
        (["--config", "llama-tiny-2cpu", "--cluster", "a40-node"], "does not say what it is built"),
    ],
)
def test_mistakes_are_said_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_measured_steps_are_compared_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(MEASURED.read_text())
    report["rows"] = [row for row in report["rows"] if row["case"] == "a8 tp1 pp2"][1:2]
    file = tmp_path / "several.json"
    file.write_text(json.dumps(report))
    assert main(["compare", str(file), "--cluster", "h200-64", "--profile", str(PROFILE)]) == 0
    out = capsys.readouterr().out
    assert "a8 tp1 pp2 m4 sequential" in out and "1 of 1 peaks of memory are within 3%" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"benchmark": "gemms"}', "is no file of `dhellam bench several`: give"),
        ('{"benchmark": "several"}', "is no file of `dhellam bench several`: give"),
        ('{"benchmark": "several", "rows": [7]}', "is no file of `dhellam bench several`: give"),
        (
            '{"benchmark": "several", "rows": [{"side": "ours", "plan": "auto", "step ms": 1}]}',
            "is no file of `dhellam bench several`: give",
        ),
        ('{"benchmark": "several", "rows": []}', "no step of ours with a built-in plan in"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "several.json"
    file.write_text(text)
    assert main(["compare", str(file), "--cluster", "h200-64"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
