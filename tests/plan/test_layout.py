"""How slots lie: a graph whose operators do not agree is refused when it is built.

The cases named after a number are those of the thirteen faults reported publicly for Megatron-core
(NVIDIA/Megatron-LM#7452) that can be said of operators here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_dhellam.plan import (
    Graph,
    GraphPair,
    Lane,
    Layout,
    LayoutError,
    Operator,
    Strand,
    check_chain,
)
from lightning_dhellam.plan.layout import CHANNELS, Held, Kept, Move, Rule
from tests.plan.graphs import no_launch

STREAM = "tp sharded(sequence), dp sharded(samples)"
GIVEN = {
    "x": STREAM,
    "dy": STREAM,
    "batch.labels": "dp sharded(samples)",
    "batch.weights": "dp sharded(samples)",
    "batch.key": "tp distinct, dp distinct",
    "batch.whole_key": "dp distinct",
}
SHARDED = Kept(sharded=frozenset({"tp"}), summed=frozenset({"dp"}))
WHOLE = Kept(summed=frozenset({"tp", "dp"}))


def on_tp(reads: Any, writes: Any = Held.REPLICATED, gradient: Any = None, **more: Any) -> Rule:
    """A rule that names tensor parallelism only."""
    return Rule({"tp": Move(reads, writes, gradient)}, **more)


GATHER = on_tp(Held.SEQUENCE, Held.REPLICATED)
SCATTER = on_tp(Held.PARTIAL, Held.SEQUENCE)
COLUMN = on_tp(Held.REPLICATED, Held.FFN)
ROW = on_tp(Held.FFN, Held.PARTIAL)
NORM = Rule(mixes=CHANNELS)
COLUMN_GRAD = on_tp((Held.FFN, Held.REPLICATED), gradient=Held.FFN, kept=(SHARDED,))


def made(
    direction: str, *operators: tuple[str, str, Rule | None], name: str = "toy", outputs: str = "y"
) -> Graph:
    """A graph of operators `(name, 'lane: reads -> writes', rule)`. It reads x or dy if it may."""
    built = []
    for operator, text, rule in operators:
        lane, _, slots = text.partition(": ")
        reads, _, writes = slots.partition("->")
        lane_of = Lane(lane)
        built.append(
            Operator(
                operator, lane_of, tuple(reads.split()), tuple(writes.split()), no_launch, rule=rule
            )
        )
    inputs = ("x",) if direction == "forward" else ("dy",)
    layouts = {slot: Layout.parse(text) for slot, text in GIVEN.items()}
    for slot in {"x", "dy"} - set(inputs):
        del layouts[slot]
    return Graph(
        name, Strand(direction), tuple(built), inputs, tuple(outputs.split()), layouts=layouts
    )


FORWARD = {
    "norm": ("norm", "compute: x -> normal rstd", NORM),
    "gather": ("gather", "tp: normal -> whole", GATHER),
    "fc1": ("fc1", "compute: whole -> inner", COLUMN),
    "act": ("act", "compute: inner -> act", None),
    "fc2": ("fc2", "compute: act -> part", ROW),
    "scatter": ("scatter", "tp: part -> out", SCATTER),
    "residual": ("residual", "compute: out x batch.key -> y", Rule(draws="batch.key")),
}
BACKWARD = {
    "gather": ("grad_gather", "tp: dy -> d_part", GATHER),
    "fc2.dgrad": ("fc2.dgrad", "compute: d_part -> d_act", COLUMN),
    "fc2.wgrad": (
        "fc2.wgrad",
        "compute: d_part act ->",
        on_tp((Held.REPLICATED, Held.FFN), gradient=Held.FFN, kept=(SHARDED,)),
    ),
    "act": ("act.grad", "compute: d_act inner -> d_inner", None),
    "fc1.dgrad": ("fc1.dgrad", "compute: d_inner -> d_whole", ROW),
    "scatter": ("grad_scatter", "tp: d_whole -> d_normal", SCATTER),
    "regather": ("regather", "tp: normal -> again", GATHER),
    "fc1.wgrad": ("fc1.wgrad", "compute: d_inner again ->", COLUMN_GRAD),
    "norm": (
        "norm.grad",
        "compute: d_normal x rstd dy -> dx",
        Rule(mixes=CHANNELS, kept=(WHOLE,)),
    ),
}


def pair(
    forward: dict[str, Any] | None = None, backward: dict[str, Any] | None = None
) -> GraphPair:
    """The toy layer with some operators replaced; None leaves one out."""
    both = [{**FORWARD, **(forward or {})}, {**BACKWARD, **(backward or {})}]
    ahead, behind = ([o for o in operators.values() if o is not None] for operators in both)
    return GraphPair(made("forward", *ahead), made("backward", *behind, outputs="dx"))


def test_every_slot_of_a_layer_that_agrees() -> None:
    assert {slot: str(layout) for slot, layout in pair().lies.items()} == GIVEN | {
        "normal": STREAM,
        "rstd": STREAM,
        "whole": "dp sharded(samples)",
        "inner": "tp sharded(ffn), dp sharded(samples)",
        "act": "tp sharded(ffn), dp sharded(samples)",
        "part": "tp partial, dp sharded(samples)",
        "out": STREAM,
        "y": STREAM,
        "d_part": "dp sharded(samples)",
        "d_act": "tp sharded(ffn), dp sharded(samples)",
        "d_inner": "tp sharded(ffn), dp sharded(samples)",
        "d_whole": "tp partial, dp sharded(samples)",
        "d_normal": STREAM,
        "again": "dp sharded(samples)",
        "dx": STREAM,
    }


LABELS = "batch.labels batch.weights"
LOGITS = ("logits", "compute: whole -> logits", on_tp(Held.REPLICATED, Held.VOCABULARY))
OF_VOCABULARY = on_tp((Held.VOCABULARY, Held.REPLICATED, Held.REPLICATED), Held.VOCABULARY)


# What is done to the layer, and what is said of it.
FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a column-parallel GEMM of a shard of the sequence": (
        "forward",
        {"gather": None, "fc1": ("fc1", "compute: normal -> inner", COLUMN)},
        "fc1 reads normal, which lies tp sharded(sequence): it needs replicated",
    ),
    "a gather of a partial sum": (
        "forward",
        {"norm": ("norm", "compute: x -> normal rstd", on_tp(Held.SEQUENCE, Held.PARTIAL))},
        "gather reads normal, which lies tp partial: it needs sharded(sequence)",
    ),
    "a residual sum with a partial sum": (
        "forward",
        {"scatter": None, "residual": ("residual", "compute: part x -> y", None)},
        "residual reads part, which lies tp partial: it needs it whole",
    ),
    "a residual sum of the whole and a shard": (
        "forward",
        {"residual": ("residual", "compute: whole x -> y", None)},
        "residual reads x, which lies tp sharded(sequence): it needs it as whole lies: replicated",
    ),
    "an activation of a partial sum": (
        "forward",
        {"scatter": ("gelu", "compute: part -> out", None)},
        "gelu reads part, which lies tp partial: it needs it whole",
    ),
    "a scatter of what is no partial sum": (
        "forward",
        {"fc2": None, "scatter": ("scatter", "tp: act -> out", SCATTER)},
        "scatter reads act, which lies tp sharded(ffn): it needs partial",
    ),
    "a norm of a shard of the channels": (
        "forward",
        {"act": ("norm2", "compute: inner -> act", NORM)},
        "norm2 reads inner, which lies tp sharded(ffn): it needs it whole",
    ),
    "attention over a shard of the sequence": (
        "forward",
        {"norm": ("attention", "compute: x -> normal", Rule(mixes=frozenset({Held.SEQUENCE})))},
        "attention reads x, which lies tp sharded(sequence): it needs it whole",
    ),
    "a collective whose rule is silent": (
        "forward",
        {"gather": ("gather", "tp: normal -> whole", None)},
        "gather communicates over tp, but its rule does not say what that changes",
    ),
    "shards that draw from one key": (
        "forward",
        {"residual": ("drop", "compute: out batch.whole_key -> y", Rule(draws="batch.whole_key"))},
        "drop reads batch.whole_key, which lies tp replicated:"
        " it needs a key of each rank, since it draws for what lies sharded(sequence)",
    ),
    "ranks that draw apart for what they have alike": (
        "forward",
        {"fc1": ("drop", "compute: whole batch.key -> inner", Rule(draws="batch.key"))},
        "drop reads batch.key, which lies tp distinct:"
        " it needs a key for all, since it draws for what lies replicated",
    ),
    "ranks that draw apart for what has a place": (
        "forward",
        {
            "residual": (
                "drop",
                "compute: out batch.key x -> y",
                Rule(draws="batch.key", placed=frozenset({Held.SEQUENCE})),
            )
        },
        "drop reads batch.key, which lies tp distinct:"
        " it needs a key for all, since it draws for what lies sharded(sequence)",
    ),
    "a weight gradient without the whole input": (
        "backward",
        {"fc1.wgrad": ("fc1.wgrad", "compute: d_inner normal ->", COLUMN_GRAD)},
        "fc1.wgrad reads normal, which lies tp sharded(sequence): it needs replicated",
    ),
    "a sharded weight whose gradient is added up, as of the users' parallel linear layers": (
        "backward",
        {
            "fc1.wgrad": (
                "fc1.wgrad",
                "compute: d_inner again ->",
                replace(COLUMN_GRAD, kept=(replace(SHARDED, summed=frozenset({"tp", "dp"})),)),
            )
        },
        "fc1.wgrad leaves the gradient of its parameter 0 tp sharded(ffn), but that parameter is"
        " sharded, and its gradient is added up later",
    ),
    "a gradient that data parallelism does not add up": (
        "backward",
        {
            "norm": (
                "norm.grad",
                "compute: d_normal x rstd dy -> dx",
                Rule(kept=(Kept(summed=frozenset({"tp"})),)),
            )
        },
        "norm.grad leaves the gradient of its parameter 0 dp partial, but that parameter is"
        " replicated, and its gradient is not added up later",
    ),
    "a gradient that is complete and added up all the same": (
        "backward",
        {"act": ("scale.grad", "compute: d_part -> d_inner", Rule(kept=(WHOLE,)))},
        "scale.grad leaves the gradient of its parameter 0 tp replicated, but that parameter is"
        " replicated, and its gradient is added up later",
    ),
    "1: the mean of a rank's vocabulary taken for the mean of all": (
        "forward",
        {
            "fc1": LOGITS,
            "act": ("smoothing", "compute: logits -> act", Rule(mixes=CHANNELS)),
        },
        "smoothing reads logits, which lies tp sharded(vocabulary): it needs it whole",
    ),
    "2: a vocabulary-parallel loss of logits that were gathered": (
        "forward",
        {
            "fc1": LOGITS,
            "act": ("logits.gather", "tp: logits -> all", on_tp(Held.VOCABULARY)),
            "fc2": ("statistics", f"compute: all {LABELS} -> part", OF_VOCABULARY),
        },
        "statistics reads all, which lies tp replicated: it needs sharded(vocabulary)",
    ),
    "3: a sum over a rank's tokens taken for the sum over all": (
        "forward",
        {
            "norm": ("count", "compute: batch.weights -> count", Rule(sums=("count",))),
            "gather": ("mean", "compute: batch.weights count -> whole", None),
        },
        "mean reads count, which lies dp partial: it needs it whole",
    ),
    "4, 5, 7: what one communicator has shards of is gathered over another": (
        "forward",
        {"gather": ("gather", "cp: normal -> whole", Rule({"cp": Move(Held.SEQUENCE)}))},
        "gather reads normal, which lies cp replicated: it needs sharded(sequence)",
    ),
    "8: a weight of which each rank has its heads, not marked as sharded": (
        "backward",
        {
            "fc1.wgrad": (
                "sinks.grad",
                "compute: d_inner again ->",
                replace(COLUMN_GRAD, kept=(WHOLE,)),
            )
        },
        "sinks.grad leaves the gradient of its parameter 0 tp sharded(ffn), but that parameter is"
        " replicated, and its gradient is added up later",
    ),
    "11: a weight that all have, and a partial gradient that nobody adds up": (
        "backward",
        {
            "norm": (
                "norm.grad",
                "compute: d_normal x rstd dy -> dx",
                Rule(kept=(Kept(summed=frozenset({"dp"})),)),
            )
        },
        "norm.grad leaves the gradient of its parameter 0 tp partial, but that parameter is"
        " replicated, and its gradient is not added up later",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_does_not_agree_is_refused(fault: str) -> None:
    direction, changed, message = FAULTS[fault]
    with pytest.raises(LayoutError) as error:
        pair(**{direction: changed})
    assert str(error.value) == f"toy {direction}: {message}"


def test_10_a_count_is_not_overwritten_by_the_sum_over_the_ranks() -> None:
    summed = on_tp(Held.PARTIAL, Held.REPLICATED)
    with pytest.raises(AssertionError, match=r"writes .*part.* a second time"):
        pair(forward={"scatter": ("sum", "tp: part -> part", summed)})


def test_a_gradient_lies_as_what_it_is_the_gradient_of() -> None:
    backward = {
        "scatter": ("reduce", "tp: d_whole -> d_normal", on_tp(Held.PARTIAL)),
        "norm": ("norm.grad", "compute: d_normal -> dx", None),
    }
    with pytest.raises(LayoutError) as error:
        pair(backward=backward)
    assert str(error.value) == f"toy backward: dx lies dp sharded(samples), but x lies {STREAM}"


def test_what_a_layer_hands_on_lies_as_the_next_needs_it() -> None:
    layer = pair()
    check_chain([layer, layer])
    whole = {"x": Layout.parse("dp sharded(samples)")}
    ahead = Graph(
        "other", Strand.FORWARD, (Operator("id", Lane.COMPUTE, ("x",), ("y",), no_launch),),
        ("x",), ("y",), layouts=whole,
    )  # fmt: skip
    behind = replace(
        ahead,
        direction=Strand.BACKWARD,
        operators=(Operator("id.grad", Lane.COMPUTE, ("dy",), ("dx",), no_launch),),
        inputs=("dy",),
        outputs=("dx",),
        layouts={"dy": whole["x"]},
    )
    other = GraphPair(ahead, behind)
    with pytest.raises(LayoutError) as error:
        check_chain([layer, other])
    assert str(error.value) == (
        f"toy forward hands on y, which lies {STREAM}; other forward needs dp sharded(samples)"
    )
    without = GraphPair(replace(ahead, layouts=None), replace(behind, layouts=None))
    check_chain([layer, without, layer])


@pytest.mark.parametrize("text", ["replicated", STREAM, "cp sharded(sequence), ep partial"])
def test_layouts_are_read_as_they_print(text: str) -> None:
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize("text", ["", "pp partial", "tp", "tp torn", "tp partial, tp partial"])
def test_what_is_no_layout(text: str) -> None:
    with pytest.raises(ValueError):
        Layout.parse(text)


def test_layouts_and_rules_change_no_fingerprint() -> None:
    layer = pair()
    for graph in (layer.forward, layer.backward):
        bare = replace(
            graph,
            operators=tuple(replace(o, rule=None) for o in graph.operators),
            layouts=None,
        )
        assert bare.fingerprint == graph.fingerprint
        assert bare == graph
