"""What layers make again is what fits into memory at the least time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from lightning_dhellam.layers import Lowered
from lightning_dhellam.pipeline.schedules import Placement
from lightning_dhellam.pipeline.stage import Leg, Stage
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair
from lightning_dhellam.plan.passes import CHOICES, recompute
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.model.stops import Place, Stop
from lightning_dhellam.search.model.walk import Walk, as_planned
from lightning_dhellam.search.recompute import Chosen, candidates, choose, moments
from lightning_dhellam.search.recompute.covering import covering
from lightning_dhellam.search.solve import solve
from tests.models.llama import SMALL
from tests.plan.real_graphs import lowered

WIDE = replace(SMALL, num_layers=4, hidden_size=512, ffn_hidden_size=1408, max_sequence_length=512)
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
        self.peak = self.played(self.kept.layers)[1]

    def played(self, layers: Sequence[GraphPair]) -> tuple[float, float]:
        """Seconds and bytes of a step of these layers."""
        costs = covering(self.costs, zip(self.measured, layers, strict=True))
        step = simulate(layers, PLAN, costs, micro_batches=MICRO_BATCHES, tokens=TOKENS)
        return step.seconds, step.peak_bytes

    def with_slots(self, slots: Sequence[frozenset[str]]) -> list[GraphPair]:
        return [recompute(pair, own) for pair, own in zip(self.kept.layers, slots, strict=True)]

    def choose(self, limit: float, builder: Builder | None = PLAN, slack: float = 0.0) -> Chosen:
        legs = self.kept.stage.step(MICRO_BATCHES).legs
        return choose(
            self.measured,
            self.kept.layers,
            moments(legs, len(self.kept.layers)),
            self.costs,
            limit=limit,
            tokens=TOKENS,
            free=[bool(key) for key in self.kept.keys],
            builder=builder,
            slack=slack,
        )


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

    def played(slots: Sequence[frozenset[str]]) -> tuple[float, float]:
        made = [recompute(pair, own) for pair, own in zip(layers, slots, strict=True)]
        return played_stage(made, legs, covering(stand.costs, zip(measured, made, strict=True)))

    needed = played([frozenset()] * 4)[1]
    named = [CHOICES[name](layers[0]) for name in ("none", "selective", "full")]
    between = [one.slots for one in candidates(layers[0], lambda operator: operator.cost, 5)]
    choices = dict.fromkeys((*named, *between[1:-1:2]))
    assert len(choices) == 5
    tried = [played(slots) for slots in product(choices, repeat=4)]
    for share in (0.5, 0.25):
        limit = share * needed
        best = min(seconds for seconds, peak in tried if peak <= limit)
        chosen = choose(
            measured,
            layers,
            moments(legs, 4),
            stand.costs,
            limit=limit,
            tokens=TOKENS,
            builder=PLAN,
        )
        seconds, peak = played(chosen.slots)
        assert seconds <= best * 1.03
        assert peak <= limit


def played_stage(
    layers: Sequence[GraphPair], legs: Sequence[Leg], costs: Costs
) -> tuple[float, float]:
    """Seconds and bytes of what a stage does in a step, one walk after the other."""

    def place(micro_batch: int | None, layer: int | None) -> Place | None:
        if layer is None or micro_batch is None:
            return None
        return Place(micro_batch, layer, layers[layer])

    stops = [
        Stop(place(leg.forward, ahead), place(leg.backward, behind))
        for leg in legs
        for ahead, behind in leg.pairs
    ]
    plans = [PLAN(*stop.graphs) for stop in stops]
    walk = Walk(stops, as_planned(costs, stops, plans))
    order = walk.order(plans)
    _, ends = walk.play(order, walk.first_of(plans))
    return max(ends), walk.peak_bytes(order, TOKENS)


@pytest.mark.parametrize("share", [0.6, 0.5])
def test_searched_plans_and_the_sequential_one_fit_what_was_chosen_for_them(
    share: float, stand: Stand
) -> None:
    limit = share * stand.peak
    slack = 0.025 * limit
    chosen = stand.choose(limit, builder=None, slack=slack)
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
    assert stand.choose(least * 1.02, builder=None).peak_bytes <= least * 1.02


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
