"""What layers make again is what fits into memory at the least time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.memory.activations import without_memory
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Topology
from lightning_dhellam.parallel.planned import planned_context
from lightning_dhellam.pipeline.schedules import Placement
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import BUILDERS, GraphPair
from lightning_dhellam.plan.offloading import ALL, Offload, movable, offload
from lightning_dhellam.plan.passes import CHOICES, recompute
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.recompute import Chosen, candidates, choose, moments
from lightning_dhellam.search.recompute.covering import covering
from lightning_dhellam.search.recompute.playing import played
from lightning_dhellam.search.solve import solve
from tests.models.llama import SMALL
from tests.plan.real_graphs import lowered

WIDE = replace(SMALL, num_layers=4, hidden_size=512, ffn_hidden_size=1408, max_sequence_length=512)
REAL = replace(
    WIDE,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    max_sequence_length=2048,
)
TOKENS, MICRO_BATCHES = 2048, 3
PLAN = BUILDERS["dhellam"]


class Stand:
    """A model of four layers on one of two ranks, by nominal times."""

    def __init__(self) -> None:
        measured = lowered(2, WIDE, torch.bfloat16, "full")
        self.measured = measured.layers
        self.kept: Lowered = lowered(2, WIDE, torch.bfloat16, "none")
        graphs = [g for pair in self.measured for g in (pair.forward, pair.backward)]
        self.costs = Costs.nominal(graphs, TOKENS)
        self.plan, self.micro_batches = PLAN, MICRO_BATCHES
        self.peak = self.played(self.kept.layers)[1]

    def played(self, layers: Sequence[GraphPair]) -> tuple[float, float]:
        """Seconds and bytes of a step of these layers."""
        costs = covering(self.costs, zip(self.measured, layers, strict=True))
        step = simulate(layers, self.plan, costs, micro_batches=self.micro_batches, tokens=TOKENS)
        return step.seconds, step.peak_bytes

    def with_slots(
        self, slots: Sequence[frozenset[str]], away: Sequence[frozenset[str]] | None = None
    ) -> list[GraphPair]:
        made = [recompute(pair, own) for pair, own in zip(self.kept.layers, slots, strict=True)]
        away = away or [frozenset()] * len(made)
        return [offload(pair, own, same, same) for pair, own in zip(made, away, strict=True)]

    def choose(self, limit: float, *, searched: bool = False, slack: float = 0.0) -> Chosen:
        legs = self.kept.stage.step(self.micro_batches).legs
        return choose(
            self.measured,
            self.kept.layers,
            legs,
            self.costs,
            limit=limit,
            tokens=TOKENS,
            free=[bool(key) for key in self.kept.keys],
            builder=None if searched else self.plan,
            slack=slack,
        )


class HostStand(Stand):
    """The same of layers as wide as real ones, whose slots may wait on the host."""

    def __init__(
        self, offload: Offload, slower: float = 1.0, micro_batches: int = MICRO_BATCHES
    ) -> None:
        def low(what: str, away: Offload) -> Lowered:
            topology = Topology(world_size=2, tp_size=2)
            model = CausalLM(REAL, planned_context(topology, torch.device("cpu")), torch.bfloat16)
            found = lower(model, recompute=what, offload=away)
            return replace(found, layers=tuple(pair.at(TOKENS) for pair in found.layers))

        with without_memory():
            self.measured = low("full", offload).layers
            self.kept = low("none", None)
        graphs = [g for pair in self.measured for g in (pair.forward, pair.backward)]
        costs = Costs.nominal(graphs, TOKENS)
        copies = {
            costs.keys[graph.fingerprint][operator.name]
            for graph in graphs
            for operator in graph.operators
            if operator.lane.copies
        }
        times = {key: own * (slower if key in copies else 1) for key, own in costs.seconds.items()}
        self.costs = replace(costs, seconds=times)
        self.plan, self.micro_batches = BUILDERS["interleaved"], micro_batches
        self.peak = self.played(self.kept.layers)[1]


def same(value: object) -> object:
    return value


@pytest.fixture(scope="module")
def stand() -> Stand:
    return Stand()


def test_nothing_is_made_again_where_all_fits(stand: Stand) -> None:
    chosen = stand.choose(stand.peak)
    assert chosen.slots == (frozenset(),) * 6
    assert chosen.peak_bytes == chosen.kept_bytes == stand.peak
    assert chosen.seconds == chosen.kept


def test_it_is_as_fast_as_the_best_of_all_choices_that_fit(stand: Stand) -> None:
    """Tried one by one by the simulator, over layers, of the named choices."""
    layer, first, last = (stand.kept.layers[at] for at in (1, 0, -1))
    made = [recompute(layer, CHOICES[name](layer)) for name in ("none", "selective", "full")]
    tried = [stand.played((first, *layers, last)) for layers in product(made, repeat=4)]
    for share in (0.8, 0.6, 0.5):
        limit = share * stand.peak
        best = min(seconds for seconds, peak in tried if peak <= limit)
        chosen = stand.choose(limit)
        seconds, peak = stand.played(stand.with_slots(chosen.slots))
        assert seconds <= best * 1.03
        assert peak <= limit and peak == pytest.approx(chosen.peak_bytes)
        saved = [pair.saved_bytes(TOKENS) for pair in stand.with_slots(chosen.slots)[1:5]]
        assert saved == sorted(saved), "early layers are held longest"


def test_a_first_stage_is_as_fast_as_the_best_of_all_at_half_and_at_a_quarter(
    stand: Stand,
) -> None:
    """Tried one by one by the simulator: named choices, and two between them, in each of 4 layers.

    The first of 4 stages, which has up to 8 micro-batches under way.
    """
    layers, measured = stand.kept.layers[1:5], stand.measured[1:5]
    legs = Stage(0, Placement.folded(4), (2, 2)).step(8).legs

    def tried_once(slots: Sequence[frozenset[str]]) -> tuple[float, float]:
        made = [recompute(pair, own) for pair, own in zip(layers, slots, strict=True)]
        costs = covering(stand.costs, zip(measured, made, strict=True))
        return played(made, legs, costs, tokens=TOKENS, builder=PLAN)

    needed = tried_once([frozenset()] * 4)[1]
    named = [CHOICES[name](layers[0]) for name in ("none", "selective", "full")]
    between = [one.slots for one in candidates(layers[0], lambda operator: operator.cost, 5)]
    choices = dict.fromkeys((*named, *between[1:-1:2]))
    assert len(choices) == 5
    tried = [tried_once(slots) for slots in product(choices, repeat=4)]
    for share in (0.5, 0.25):
        limit = share * needed
        best = min(seconds for seconds, peak in tried if peak <= limit)
        chosen = choose(
            measured,
            layers,
            legs,
            stand.costs,
            limit=limit,
            tokens=TOKENS,
            builder=PLAN,
        )
        seconds, peak = tried_once(chosen.slots)
        assert seconds <= best * 1.03
        assert peak <= limit


@pytest.mark.parametrize("share", [0.6, 0.5])
def test_searched_plans_and_the_sequential_one_fit_what_was_chosen_for_them(
    share: float, stand: Stand
) -> None:
    limit = share * stand.peak
    slack = 0.025 * limit
    chosen = stand.choose(limit, searched=True, slack=slack)
    layers = stand.with_slots(chosen.slots)
    costs = covering(stand.costs, zip(stand.measured, layers, strict=True))
    solution = solve(layers, costs, tokens=TOKENS, memory_slack=slack)
    for builder in (solution.builder(), BUILDERS["sequential"]):
        step = simulate(layers, builder, costs, micro_batches=MICRO_BATCHES, tokens=TOKENS)
        assert step.peak_bytes <= limit


def test_a_search_finds_room_where_the_sequential_plan_has_it(stand: Stand) -> None:
    """What hides best holds most: without a limit, plans would need a fifth more than that."""
    layers = [stand.kept.layers[0]]
    layers += [recompute(pair, CHOICES["full"](pair)) for pair in stand.kept.layers[1:]]
    costs = covering(stand.costs, zip(stand.measured, layers, strict=True))
    sequential = BUILDERS["sequential"]
    least = simulate(
        layers, sequential, costs, micro_batches=MICRO_BATCHES, tokens=TOKENS
    ).peak_bytes
    assert stand.choose(least * 1.02, searched=True).peak_bytes <= least * 1.02


def test_what_fits_into_nothing_is_refused_with_the_least(stand: Stand) -> None:
    with pytest.raises(ValueError, match="recompute='auto' finds nothing that fits") as caught:
        stand.choose(1e5)
    message = str(caught.value)
    assert "is 0.1 MiB: raise memory_limit, or make micro_batch_size" in message
    least = float(message.split("activations need ")[1].split(" MiB")[0])
    full = [frozenset[str](), *(pair.forward.written for pair in stand.kept.layers[1:])]
    assert 0 < least * 2**20 <= stand.played(stand.with_slots(full))[1] * 1.01


@pytest.mark.parametrize("ranks", [1, 2])
def test_candidates_save_less_the_longer_they_take(ranks: int) -> None:
    layer = lowered(ranks, WIDE, torch.bfloat16, "none").layers[1]
    found = candidates(layer, lambda operator: operator.cost)
    assert found[0].slots == frozenset() and found[0].saved * 64 == layer.saved_bytes(64)
    for before, after in pairwise(found):
        assert before.saved > after.saved and before.seconds < after.seconds
    for one in found:
        pair = recompute(layer, one.slots)
        assert pair.saved_bytes(64) == one.saved * 64
        again = [o.cost for o in pair.backward.operators if o.name.endswith(".again")]
        assert one.seconds == pytest.approx(sum(again))
    assert recompute(layer, found[-1].slots).saved == ("x",)
    assert [c.slots for c in candidates(layer, lambda operator: operator.cost, 0)] == [frozenset()]


def test_the_host_is_used_where_its_link_hides() -> None:
    """Layers that compute for longer than half of what they save takes to the host and back."""
    alone, hosted = (HostStand(what, micro_batches=12) for what in (None, ALL))
    kept = alone.played(alone.kept.layers)[0]
    limit = 0.5 * alone.peak
    computing, chosen = alone.choose(limit), hosted.choose(limit)
    assert not any(computing.away) and any(chosen.away[1:-1])
    seconds, peak = hosted.played(hosted.with_slots(chosen.slots, chosen.away))
    slower, _ = alone.played(alone.with_slots(computing.slots))
    assert peak <= limit and peak == pytest.approx(chosen.peak_bytes, rel=0.01)
    assert seconds - kept < 0.6 * (slower - kept)
    for pair, away in zip(hosted.with_slots(chosen.slots), chosen.away, strict=True):
        assert away <= {*movable(pair, ALL)}, "what is made again is not copied"


def test_a_slow_link_to_the_host_is_left_alone() -> None:
    alone, hosted = HostStand(None), HostStand(ALL, slower=100.0)
    limit = 0.6 * alone.peak
    chosen = hosted.choose(limit)
    assert not any(chosen.away) and chosen.slots == alone.choose(limit).slots


@pytest.mark.parametrize("slower", [0.3, 2.0, 10.0])
def test_with_the_host_it_fits_and_is_never_slower_than_without(slower: float) -> None:
    alone, hosted = (HostStand(what, slower, micro_batches=6) for what in (None, ALL))
    some = 0
    for share in (0.8, 0.6, 0.5, 0.4):
        limit = share * alone.peak
        without, chosen = alone.choose(limit), hosted.choose(limit)
        seconds, peak = hosted.played(hosted.with_slots(chosen.slots, chosen.away))
        assert peak <= limit
        assert seconds <= alone.played(alone.with_slots(without.slots))[0]
        if not any(chosen.away):
            assert chosen.slots == without.slots
        some += any(chosen.away)
    assert slower > 2 or some


def test_with_the_host_it_is_as_fast_as_the_best_of_all_choices_that_fit() -> None:
    """Tried one by one by the simulator, over layers, of named choices and copies."""
    hosted = HostStand(ALL)
    layer, first, last = (hosted.kept.layers[at] for at in (1, 0, -1))
    full = recompute(layer, CHOICES["full"](layer))
    made = [layer, recompute(layer, CHOICES["selective"](layer)), full]
    made += [offload(layer, ["gate_up"], same, same), offload(full, ["x"], same, same)]
    tried = [hosted.played((first, *layers, last)) for layers in product(made, repeat=4)]
    for share in (0.7, 0.4):
        limit = share * hosted.peak
        best = min(seconds for seconds, peak in tried if peak <= limit)
        chosen = hosted.choose(limit)
        seconds, peak = hosted.played(hosted.with_slots(chosen.slots, chosen.away))
        assert peak <= limit
        assert seconds <= best * 1.03


def test_early_stages_hold_more_micro_batches() -> None:
    """At most 2P - s of them in the first chunk of stage s of a fold."""
    held = []
    for number in range(3):
        stage = Stage(number, Placement.folded(3), (2, 2))
        legs = stage.step(8).legs
        found = moments(legs, 4)
        held.append(max(moment.saved[0] for moment in found))
        counts = [moment.saved for moment in found]
        assert all(a >= b for saved in counts for a, b in pairwise(saved[:2])), "later layers less"
        assert sum(found.values()) == sum(len(leg.pairs) for leg in legs)
    assert held == sorted(held, reverse=True) and held[0] > held[-1]
