"""Slots that wait in host memory: no bit of difference, and less on the device."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.engine import Engine
from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.layers.host_memory import HostMemory
from lightning_dhellam.memory.activations import activation_peak, without_memory
from lightning_dhellam.models import CausalLM, LoRA, add_lora
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.planned import planned_context
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.pipeline.schedules import SCHEDULES
from lightning_dhellam.plan import BUILDERS, GraphPair, Lane, validate
from lightning_dhellam.plan.offloading import ALL, check_choice, check_offload, offload
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.solve import Budget, solve_pair
from tests.engine.harness import CPU, add_main_grads, batch_of, differing, engine_of, pieces, train
from tests.models.llama import SMALL
from tests.models.mixtures import MIXTURES
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

CONFIG = replace(SMALL, num_layers=3, hidden_dropout=0.1)
MIXTURE = replace(MIXTURES["mixtral"], hidden_dropout=0.1)
RECOMPUTE = ("none", "gathers", "selective", "full")


def model_of(context: ParallelContext, config: Any = CONFIG) -> CausalLM:
    model = CausalLM(config, context)
    if context.device.type != "cpu":  # where tensors without memory could not be moved
        model.to(context.device)
    add_main_grads(model)
    return model


def _slots(lowered: Lowered) -> set[str]:
    return {slot for pair in lowered.layers for slot in pair.saved}


def wrong(context: ParallelContext, sets: int, config: Any = CONFIG) -> list[str]:
    """Random sets under random plans that differ in a bit from a run that offloads nothing."""
    model = model_of(context, config)
    given = {name: value.to(context.device) for name, value in batch_of(config, 3, 16).items()}
    batch = pieces(given, 1, context)
    device = context.device
    expected = train(engine_of(lower(model, recompute="none"), device), model, batch)
    known = sorted(_slots(lower(model, recompute="none")))
    found = []
    for seed in range(sets):
        draw = random.Random(seed)
        what: str | list[str] = ALL if seed == 0 else draw.sample(known, draw.randint(1, 6))
        scheme = SCHEDULES["zb-v" if seed % 3 == 2 else "fold"]
        lowered = lower(model, recompute=RECOMPUTE[seed % 4], offload=what, scheme=scheme)
        built = list(BUILDERS.values())
        builder = built[seed % len(built)] if seed % 5 == 4 else random_builder(seed)
        engine = engine_of(lowered, device, builder, poison=seed % 2 == 0)
        for _ in range(2):  # the second of which takes the same buffers again
            names = differing(train(engine, model, batch), expected)
            found += [f"{what}: {name}" for name in names]
        assert lowered.host is not None and not engine.evaluate(batch).isnan()
    return found


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["dense", "experts"])
def test_no_set_of_slots_changes_a_bit(config: Any) -> None:
    assert wrong(ParallelContext.single(CPU), 12, config) == []


def _on_rank(rank: int) -> list[str]:
    found = []
    for sizes in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        context = ParallelContext.create(CPU, **sizes)
        found += wrong(context, 6)
        context.destroy(keep=True)
    return found


def test_nor_on_two_ranks() -> None:
    assert run_ranks(2, _on_rank) == [[], []]


def _trained(what: Collection[str] | None) -> tuple[Engine, Lowered]:
    model = model_of(ParallelContext.single(CPU))
    lowered = lower(model, recompute="none", offload=what)
    engine = engine_of(lowered, builder=BUILDERS["sequential"])
    for _ in range(3):
        engine.train(pieces(batch_of(CONFIG, 3, 16), 1, model.context))
    return engine, lowered


def test_what_is_offloaded_is_on_the_host_and_counted_as_predicted() -> None:
    kept, _ = _trained(None)
    engine, lowered = _trained(ALL)
    assert sum(pair.saved_bytes(16) for pair in lowered.layers) == 0
    assert engine.lanes.ledger.peak_bytes < 0.6 * kept.lanes.ledger.peak_bytes
    topology = Topology()
    with without_memory():
        planned = lower(
            model_of(planned_context(topology, CPU)),  # type: ignore[arg-type]
            recompute="none",
            offload=ALL,
        )
        peak = activation_peak(
            planned,
            BUILDERS["sequential"],
            topology,
            samples=3,
            micro_batch_size=1,
            length=16,
        )
    assert peak.slots == engine.lanes.ledger.peak_bytes
    # Steps after the first take the same buffers again.
    assert lowered.host is not None and lowered.host.bytes == peak.host > 0


def test_copies_stand_where_they_can_be_hidden() -> None:
    lowered = lower(model_of(ParallelContext.single(CPU)), recompute="full", offload=["x"])
    pair = lowered.layers[1]
    (away,) = (o for o in pair.forward.operators if o.lane is Lane.OFFLOAD)
    assert away.reads == ("x",) and pair.saved == away.writes == ("x_on_host",)
    names = [o.name for o in pair.backward.operators]
    readers = [o.name for o in pair.backward.operators if "x_back" in o.reads]
    assert names.index("x.fetch") < min(map(names.index, readers))
    assert pair.name == "transformer+full+offload"


class Block(torch.nn.Module):
    """A user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(CONFIG.hidden_size, CONFIG.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).tanh()


def _loss(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def test_graphs_of_autograd_stay_with_what_they_hold() -> None:
    model = CausalLM(CONFIG, ParallelContext.single(CPU))
    model.layers[1] = Block()
    add_main_grads(model)
    batch = pieces(batch_of(CONFIG, 3, 16), 1, model.context)
    expected = train(engine_of(lower(model, recompute="none", loss=_loss)), model, batch)
    lowered = lower(model, recompute="none", offload=ALL, loss=_loss)
    engine = engine_of(lowered, poison=True)
    for _ in range(2):
        assert differing(train(engine, model, batch), expected) == []
    kept = {slot for pair in lowered.layers for slot in pair.saved} & {"autograd", "loss_graph"}
    assert kept == {"autograd", "loss_graph"} and lowered.layers[-1].saved_bytes(16) > 0


def test_attention_that_records_keeps_what_it_reads() -> None:
    model = model_of(ParallelContext.single(CPU))
    pair = lower(model, recompute="none").layers[1]
    operators = [
        replace(o, records=("attention_state",)) if o.name == "attention" else o
        for o in pair.forward.operators
    ]
    recording = GraphPair(replace(pair.forward, operators=tuple(operators)), pair.backward)
    (attention,) = (o for o in operators if o.records)
    held = {*attention.reads, *attention.writes}
    for what, stays in ((pair, set()), (recording, held & {*pair.saved})):
        moved = offload(what, ALL, lambda value: value, lambda value: value)
        assert {slot for slot in moved.saved if not slot.endswith("_on_host")} == stays


def test_sizes_that_no_step_has_seen_before_take_the_same_buffers() -> None:
    """As experts have them, which other tokens choose in each step."""
    memory, draw, taken = HostMemory(CPU), random.Random(0), []
    for _ in range(60):
        rows = [draw.randint(0, 400) for _ in range(8)]
        wide = [torch.randn(2 * n, 24).to(draw.choice([torch.bfloat16, torch.half])) for n in rows]
        # Also what has gaps, and what lies the other way round.
        values = [(t[:, :12].contiguous(), t[::2], t.t()) for t in wide]
        held = [memory.away(value) for value in values]
        for value, one in zip(values, held, strict=True):
            for tensor, back in zip(value, memory.back(one), strict=True):
                assert torch.equal(back, tensor) and back.dtype == tensor.dtype
                assert back.stride() == torch.empty_like(tensor).stride()
        del held, one
        taken.append(memory.bytes)
    assert taken[-1] < 1.25 * taken[19], "it grows with each new size"
    assert taken[-1] < 4 * 24 * (800 * 24 * 2)


def test_what_ranks_have_partial_sums_of_is_copied_as_it_is() -> None:
    with without_memory():
        model = CausalLM(CONFIG, planned_context(Topology(world_size=2, tp_size=2), CPU))  # type: ignore[arg-type]
        add_lora(model, LoRA(rank=4, alpha=8), 1)
        pair = lower(model, recompute="none", offload=ALL).layers[1]
    for slot in ("proj_low", "gate_up"):
        copies = {str(pair.lies[name]) for name in (slot, f"{slot}_on_host", f"{slot}_back")}
        assert copies == {"tp partial" if slot == "proj_low" else "tp sharded(ffn)"}


def test_a_search_orders_copies_as_all_other_operators() -> None:
    pair = lower(model_of(ParallelContext.single(CPU)), recompute="full", offload=["x"]).layers[1]
    costs = Costs.nominal((pair.forward, pair.backward), 16)
    budget = Budget(evaluations=60, rare_evaluations=20, exact_operators=0)
    plan = solve_pair(pair, pair, costs, budget=budget).plan
    validate(plan, pair.forward, pair.backward)
    rows = [(row.strand, row.operator) for row in plan.issues if row.lane.copies]
    assert sorted(rows) == [("backward", "x.fetch"), ("forward", "x.offload")]


def test_what_cannot_be_offloaded_is_refused() -> None:
    known = {"x", "gate_up", "qkv"}
    check_offload(["x", "qkv"], known)
    check_offload(ALL, known)
    with pytest.raises(ValueError, match=r"offload names 'gateup', which no layer.*'gate_up'\?"):
        check_offload(["gateup"], known)
    with pytest.raises(
        ValueError, match="offload='gate_up' must be 'all', 'auto' or a list of slots"
    ):
        check_choice("gate_up", "none")
    with pytest.raises(ValueError, match="recompute='auto' chooses among what stays"):
        check_choice(ALL, "auto")
    with pytest.raises(ValueError, match="offload='auto' is chosen together with what is made ag"):
        check_choice("auto", "full")
    check_choice("auto", "auto")
    with pytest.raises(ValueError, match="is by layer, which only 'auto' chooses: use 'all'"):
        check_choice({"0": ["x"]}, "full")
    check_offload({"0": ["x"], "head": ALL}, known, ["", "0", "head"])
    with pytest.raises(ValueError, match=r"layer 'haed', which .*its layers are 0, head.*'head'\?"):
        check_offload({"haed": ["x"]}, known, ["", "0", "head"])
    with pytest.raises(ValueError, match="offload names 'gateup', which no layer"):
        check_offload({"0": ["gateup"]}, known, ["0"])


def test_memory_is_held_for_a_few_copies_only() -> None:
    """Where nothing goes backward that compute would wait for."""
    topology = Topology()
    with without_memory():
        found = []
        for layers in (4, 8):
            model = model_of(
                planned_context(topology, CPU),
                replace(CONFIG, num_layers=layers),  # type: ignore[arg-type]
            )
            lowered = lower(model, recompute="none", offload=ALL)
            peak = activation_peak(
                lowered, BUILDERS["sequential"], topology, samples=1, micro_batch_size=1, length=64
            )
            found.append(peak.allocated)
    assert found[0] == pytest.approx(found[1], rel=0.02), "it grows with the layers"
