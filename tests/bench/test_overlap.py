"""`dhellam bench overlap` and `pairs`, rehearsed on the CPU from option to file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_dhellam.bench import plans
from lightning_dhellam.bench.command import bench_command
from lightning_dhellam.bench.overlap import rank
from lightning_dhellam.bench.overlap.calibrate import find_rising
from lightning_dhellam.bench.overlap.cells import Cell, cells
from lightning_dhellam.bench.overlap.cut import cost_of_cutting
from lightning_dhellam.bench.overlap.rank import Rank
from lightning_dhellam.bench.overlap.settings import LINKS
from lightning_dhellam.bench.shapes import parse_link, rank_of, shapes
from lightning_dhellam.bench.workload import trunk
from lightning_dhellam.engine import OperatorTimer
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.plan import Lane
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.solve import Budget
from tests.engine.harness import CPU

REHEARSE = ("--device", "cpu", "--repeats", "2")
SHORT = ("--rounds", "1", "--micro_batches", "[1,2]")


@pytest.fixture(autouse=True)
def little_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search for a moment only: how good the searched plans are is tested elsewhere."""
    monkeypatch.setattr(rank, "budget_within", lambda *_, **__: Budget(evaluations=200))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A benchmark leaves no process group behind."""
    yield
    assert not dist.is_initialized()


def bench(name: str, folder: Path, *words: str) -> dict[str, Any]:
    """What the benchmark has written."""
    assert bench_command([name, *REHEARSE, *words, "--output", str(folder)]) == 0
    (file,) = folder.glob(f"{name}-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_plan_of_a_cell_is_measured_and_computes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--rounds", "1", "--micro_batches", "[2,4]", "--links", "[copy:110]")
    found = bench("overlap", tmp_path, *words, "--cells", "[a4]")
    rows = {row["plan"]: row for row in found["rows"]}
    names = {"sequential", "megatron", "dhellam", "interleaved", "pairs", "order", "auto"}
    assert rows.keys() == {"bound", "compute", *names}
    for name in names:
        assert rows[name]["parity"] == 0.0, "plans decide when, never what"
        assert rows[name]["predicted ms"] > 0 and rows[name]["peak GiB"] > 0
    # 0.11 GB/s: ten collectives of 64 x 64 fp32 numbers, seven eighths of which cross.
    communication = 10 * (10e-6 + 64 * 64 * 4 * 7 / 8 / 0.11e9) * 1e3
    assert rows["bound"]["layer ms"] >= 0.9 * communication
    assert rows["auto"]["search s"] > 0 and "search s" not in rows["bound"]
    assert "EMULATED" in found and "REHEARSAL" in found
    assert "asked" in found["a4 copy:110"] and "search auto" in found["a4 copy:110"]
    assert (tmp_path / "overlap-a4-copy-110.png").stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 3, "JSON, table and picture"
    assert "a4 copy:110" in capsys.readouterr().out


def test_a_calibrated_link_is_found(tmp_path: Path) -> None:
    words = ("--links", "[16sm:200]", "--cells", "[b4]", "--plans", "[sequential,megatron]")
    found = bench("overlap", tmp_path, *SHORT, *words)
    assert {row["cell"] for row in found["rows"]} == {"b4 16sm:calibrated"}
    assert "on 16 SMs" in found["b4 16sm:calibrated"]


def test_a_cell_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Rank.measure

    def fail(self: Rank, cell: Cell) -> Any:
        if cell.link.sms:
            raise RuntimeError("no such link")
        return measure(self, cell)

    monkeypatch.setattr(Rank, "measure", fail)
    words = (
        "--links",
        "[16sm:200,copy:110]",
        "--cells",
        "[a4]",
        "--plans",
        "[sequential,megatron]",
    )
    found = bench("overlap", tmp_path, *SHORT, *words)
    assert found["FAILED a4 16sm:200"] == "RuntimeError: no such link"
    assert {row["cell"] for row in found["rows"]} == {"a4 copy:110"}


def test_cells_that_the_budget_does_not_allow_are_named(tmp_path: Path) -> None:
    found = bench("overlap", tmp_path, "--budget", "-1", "--links", "[copy:110,16sm:100]")
    assert found["rows"] == []
    assert found["not measured, for lack of time"].startswith("a4 copy:110, a4 16sm:100, b4 copy")


def test_sequences_are_shared_in_either_way(tmp_path: Path) -> None:
    cells = ["c4 copy:110 ring copy:50", "d4 copy:110 all_gather copy:50"]
    words = ("--links", "[copy:110]", "--context_links", "[copy:50]")
    words += ("--cells", f"[{','.join(cells)}]")
    plans = ("--plans", "[sequential,megatron,auto]")
    found = bench("overlap", tmp_path, *SHORT, *words, *plans)
    rows = {(row["cell"], row["plan"]): row for row in found["rows"]}
    assert [cell for cell, plan in rows if plan == "bound"] == cells
    for cell in cells:
        for plan in ("sequential", "megatron", "auto"):
            assert rows[cell, plan]["parity"] == 0.0, "plans decide when, never what"
        (cut,) = re.findall(r"attention ([\d.]+) × a 4th of the uncut one", found[cell])
        assert float(cut) > 0
    # 0.05 GB/s: keys and values of 128 / 4 tokens, of a head on each of 8 ranks, 8 fp32 numbers.
    # Three hops forward, and backward as many with them and with their gradients.
    hops = 9 * (10e-6 + 32 * 2 * 8 * 4 / 0.05e9) * 1e3
    assert rows["c4 copy:110 ring copy:50", "bound"]["layer ms"] >= 0.9 * hops


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_cutting_costs_what_all_parts_of_attention_take_in_shares_of_the_whole(
    exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shapes(rehearse=True)["d"]
    cluster = Cluster(shape.world_size, {Lane.TP: Link(1e9), Lane.CP: Link(1e9)})
    with rank_of(cluster, shape.ranks, CPU, shape.context_ranks) as context:
        model = CausalLM(shape.config, context)
        work = trunk(model, 1, shape.length, 1, 1, context_exchange=exchange)
        graphs = [graph for pair in work.layers for graph in (pair.forward, pair.backward)]
        costs = Costs.nominal(graphs, 1)
        costs = replace(costs, seconds=dict.fromkeys(costs.seconds, 1.0))
        monkeypatch.setattr(OperatorTimer, "alone", lambda *_: [8.0, 2.0, 5.0])
        # Blocks and their gradients, merges, packing, joining, and what a ring adds on the way.
        parts = 4 + 4 + 3 + 2 + 1 + (2 if exchange == "ring" else 0)
        assert cost_of_cutting(work, costs, shape.length, 1) == pytest.approx(4 * parts / (5 + 5))


def test_experts_are_spread_over_ranks(tmp_path: Path) -> None:
    words = ("--links", "[copy:110]", "--expert_links", "[copy:25,16sm:50]")
    words += ("--cells", "[m4 copy]", "--plans", "[sequential,megatron,auto]")
    found = bench("overlap", tmp_path, *SHORT, *words)
    rows = {row["plan"]: row for row in found["rows"]}
    assert {row["cell"] for row in found["rows"]} == {"m4 copy:25"}
    for plan in ("sequential", "megatron", "auto"):
        assert rows[plan]["parity"] == 0.0, "plans decide when, never what"
        assert rows[plan]["predicted ms"] > 0 and rows[plan]["of sequential"] > 0
    # 0.025 GB/s: there and back in each direction, two rows of 64 fp32 numbers for each of 256
    # tokens, seven eighths of which cross.
    exchanges = 4 * 2 * 256 * 64 * 4 * 7 / 8 / 0.025e9 * 1e3
    assert rows["bound"]["layer ms"] >= 0.9 * exchanges
    low, high = re.findall(r"(\d+)%", found["m4 copy:25"].partition("rows of a layer")[2])[:2]
    assert 70 <= int(low) <= 100 <= int(high) <= 130, "what arrives is as much as what leaves"


def test_a_cell_may_make_again_what_it_says_or_what_fits(tmp_path: Path) -> None:
    words = ("--links", "[copy:110]", "--cells", "[a4]", "--plans", "[sequential,megatron,auto]")
    again = ("--recompute", "[none,auto:0.5]")
    found = bench("overlap", tmp_path, *SHORT, *words, *again)
    rows = {(row["cell"], row["plan"]): row for row in found["rows"]}
    none, fits = "a4 copy:110 none", "a4 copy:110 auto:0.5"
    assert {cell for cell, _ in rows} == {none, fits}
    for (_, plan), row in rows.items():
        assert plan in ("bound", "compute") or row["parity"] == 0.0, "nor does it change a bit"
    assert rows[none, "auto"]["of none"] == 1
    # Megatron's order makes again what all layers do; the other plans what fits.
    assert rows[fits, "auto"]["of none"] < 0.65
    assert re.search(r"Megatron's order has '(selective|full)'", found[fits])
    assert "35%" < found[f"recompute: {fits}"].partition("and ")[2] < "99%"
    assert f"recompute: {none}" not in found


def test_what_fits_into_half_and_a_quarter_stands_beside_megatrons_choice_that_fits(
    tmp_path: Path,
) -> None:
    words = ("--links", "[copy:110]", "--cells", "[a8]", "--plans", "[sequential,megatron,auto]")
    found = bench("overlap", tmp_path, *SHORT, *words, "--recompute", "[none,auto:0.5,auto:0.25]")
    rows = {(row["cell"], row["plan"]): row for row in found["rows"]}
    none, *cells = ("a8 copy:110 none", "a8 copy:110 auto:0.5", "a8 copy:110 auto:0.25")
    needed = rows[none, "sequential"]["slots MiB"]
    assert rows[none, "auto"]["recompute"] == "none" and "of limit" not in rows[none, "auto"]
    for cell, share, theirs in zip(cells, (0.5, 0.25), ("selective", "full"), strict=True):
        own, other = rows[cell, "auto"], rows[cell, "megatron"]
        for plan in ("sequential", "megatron", "auto"):
            row = rows[cell, plan]
            assert row["of limit"] <= 1 and row["parity"] == 0.0
            assert row["slots MiB"] == pytest.approx(row["of limit"] * share * needed)
        assert (own["recompute"], other["recompute"]) == ("auto", theirs)
        assert own["step over megatron"] == pytest.approx(other["step ms"] / own["step ms"])
        said = found[f"limit: {cell}"]
        assert said.startswith(f"auto's step is {own['step over megatron']:.3f} × as fast")
        assert f"with '{theirs}', the least of its own that fits" in said
        assert f"activations take {1 - own['slots MiB'] / needed:.0%} less than with none" in said


def test_a_cell_may_compute_and_gather_in_8_bits(tmp_path: Path) -> None:
    words = ("--links", "[copy:110]", "--cells", "[a4]", "--plans", "[sequential,megatron,auto]")
    words = (*words, "--fp8", "[null, current]", "--fp8_all_gather", "[false, true]")
    found = bench("overlap", tmp_path, *SHORT, *words)
    cells_of = {row["cell"] for row in found["rows"]}
    plain, eight = "a4 copy:110", "a4 copy:110 current fp8_all_gather"
    assert cells_of == {plain, "a4 copy:110 current", eight}
    rows = {(row["cell"], row["plan"]): row for row in found["rows"]}
    for plan in ("sequential", "megatron", "auto"):
        assert rows[eight, plan]["parity"] == 0.0, "nor does it change a bit"
        assert rows[eight, plan]["saved MiB"] < rows[plain, plan]["saved MiB"]
    times = found[f"8 bits: {eight}"]
    ratio = rows[plain, "auto"]["layer ms"] / rows[eight, "auto"]["layer ms"]
    assert times == f"auto {ratio:.3f} times as fast as without"


@pytest.mark.parametrize(("seconds", "evaluations"), [(4.0, 4000), (1e-3, 480), (1e3, 16_000)])
def test_a_search_is_as_long_as_asked_for(
    seconds: float, evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def takes_a_millisecond_an_order(*_: Any, budget: Budget, **__: Any) -> None:
        clock[0] += budget.evaluations / 1e3

    monkeypatch.setattr(plans, "solve", takes_a_millisecond_an_order)
    monkeypatch.setattr(plans.time, "perf_counter", lambda: clock[0])
    found = plans.budget_within(seconds, (), Costs({}, {}))
    assert found is not None and found.evaluations == evaluations


def test_the_most_important_cells_come_first() -> None:
    links = [parse_link(text) for text in LINKS]
    names = [cell.name for cell in cells(links, calibrate=True, levers=True)]
    assert names == [
        "a4 copy:110",
        "a4 16sm:200",
        "a4 copy:370",
        "a4 16sm:370",
        "a4 16sm:100",
        "b4 copy:calibrated",
        "b4 16sm:calibrated",
        "a8 copy:110",
        "a8 16sm:200",
        "a8 copy:370",
        "a8 16sm:370",
        "a8 16sm:100",
        "a4 16sm:200 streams of equal priority",
        "a4 8sm:200 8 SMs",
        "a4 24sm:200 24 SMs",
    ]


def test_links_are_written_as_they_are_read() -> None:
    assert parse_link("copy:110") == Link(110e9)
    assert parse_link("16sm:200.5") == Link(200.5e9, sms=16)
    for text in ("110", "copy", "sm:200", "copy:110GB/s"):
        with pytest.raises(ValueError, match=r"write copy:110"):
            parse_link(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plans", "[sequential,megatron,best]"), "--plans: 'best' is not a plan"),
        (("--plans", "[sequential,auto]"), "--plans: 'megatron' must be among them"),
        (("--micro_batches", "[2,2]"), r"--micro_batches \[2, 2\]: give two different"),
        (("--links", "[fast]"), "link 'fast'"),
        (("--fp8", "[fp4]"), "--fp8: 'fp4' is not known: use current or blockwise, or null"),
        (("--fp8_all_gather", "[true]"), "--fp8_all_gather .True. is of layers in 8 bits: give"),
        (("--recompute", "[most]"), "--recompute: 'most' is not a choice: use none, gathers"),
        (("--recompute", "[auto:half]"), "--recompute: 'auto:half' is not .* auto:0.5 for half"),
        (("--recompute", "[auto:2]"), "--recompute: 'auto:2' is not a choice"),
        (("--search_time", "0"), "--search_time 0.0 must be more than 0 seconds"),
        (("--memory_slack", "-0.1"), "--memory_slack -0.1 must be at least 0"),
        (("--cluster", "h20-node"), "did you mean 'h200-node'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        bench("overlap", tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_pairs_draws_what_hides_what(tmp_path: Path) -> None:
    found = bench("pairs", tmp_path, "--cluster", "a800-node")
    collectives = {row["collective"]: row for row in found["rows"]}
    assert {"qkv.gather", "proj.scatter"} & collectives.keys()
    times = collectives.pop("(alone us)")
    assert "attention.grad" in times, "takes long enough to be shown"
    for row in collectives.values():
        assert row["alone us"] > 0 and 0 <= row["attention.grad"] <= 1
        assert all(min(pair) >= 1 for pair in row["slowdowns"].values())
    assert "emulated cluster" in found["device"] and "EMULATED" in found
    (picture,) = tmp_path.glob("pairs-a-*.png")
    assert picture.stat().st_size > 10_000


def test_pairs_of_a_layer_whose_sequences_are_shared(tmp_path: Path) -> None:
    found = bench("pairs", tmp_path, "--shape", "d")
    # Gradients by keys, in fp32 too, are as many bytes: both are timed as one.
    assert "keys.exchange.1" in {row["collective"] for row in found["rows"]}
    assert "tp: " in found["EMULATED"] and "; cp: " in found["EMULATED"]
    with pytest.raises(ValueError, match=r"--cluster a800-node has no link 'cp', .* of shape d"):
        bench("pairs", tmp_path, "--shape", "d", "--cluster", "a800-node")


def test_a_rising_function_is_inverted() -> None:
    seen = []

    def exposed(x: float) -> float:
        seen.append(x)
        return max(0.0, 3 * x - 5)

    assert find_rising(exposed, 7.0, 1.0) == pytest.approx(4.0, rel=0.01)
    assert len(seen) <= 10
    assert find_rising(exposed, 7.0, 1000.0, steps=20) == pytest.approx(4.0, rel=0.01)


def test_what_is_never_reached_ends_at_the_closest() -> None:
    assert find_rising(lambda x: min(x, 1.0), 7.0, 1.0, steps=5) >= 1.0


def test_nothing_is_tried_below_the_lowest() -> None:
    seen: list[float] = []

    def exposed(x: float) -> float:
        seen.append(x)
        return x

    assert find_rising(exposed, 2.0, 4.0, lowest=2.7) == 2.7
    assert seen == [4.0, 2.7], "the lowest only once"
    seen.clear()
    assert find_rising(exposed, 2.0, 1.0, lowest=2.7) == 2.7
    assert seen == [2.7], "also where it would start there"


def test_levers_are_compared_with_the_cell_without_them(tmp_path: Path) -> None:
    words = ("--levers", "true", "--cells", "[a4 16sm:200,a4 8sm]", *SHORT)
    words += ("--plans", "[sequential,megatron,auto]", "--links", "[16sm:200]")
    found = bench("overlap", tmp_path, *words)
    cells = {row["cell"] for row in found["rows"]}
    assert cells == {
        "a4 16sm:200",
        "a4 16sm:200 streams of equal priority",
        "a4 8sm:200 8 SMs",
    }
    for lever in ("streams of equal priority", "8 SMs"):
        assert found[f"lever: {lever}"].endswith("% faster than a4 16sm:200")
