"""What layers make again is what fits into memory at the least time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from lightning_dhellam.layers import Lowered
from lightning_dhellam.pipeline.schedules import Placement
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import BUILDERS, GraphPair
from lightning_dhellam.plan.passes import CHOICES, recompute
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.recompute import Chosen, candidates, choose, moments
from lightning_dhellam.search.recompute.covering import covering
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

    def choose(self, limit: float) -> Chosen:
        legs = self.kept.stage.step(MICRO_BATCHES).legs
        return choose(
            self.measured,
            self.kept.layers,
            moments(legs, len(self.kept.layers)),
            self.costs,
            limit=limit,
            tokens=TOKENS,
            free=[bool(key) for key in self.kept.keys],
            builder=PLAN,
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
