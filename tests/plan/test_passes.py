"""What backward makes again, on small graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_dhellam.plan import GraphPair, Lane, Operator
from lightning_dhellam.plan.passes import CHOICES, check_recompute, chosen, of_head, recompute
from tests.plan.graphs import graph, no_launch

FORWARD = """
norm compute: x -> normal statistics
gather tp: normal -> whole
gemm compute: whole -> inner
count host: inner -> rows
act compute: inner rows -> outer
add compute: outer x -> y
"""
BACKWARD = """
act.grad compute: dy inner -> d_inner
act.wgrad compute: dy outer ->
wgrad compute: d_inner whole ->
norm.grad compute: d_inner x statistics -> dx
"""


def _pair(light: tuple[str, ...] = ("norm", "gather", "act"), **changed: Operator) -> GraphPair:
    forward = graph("forward", FORWARD, "x", "y")
    operators = tuple(
        changed.get(o.name, replace(o, light=o.name in light)) for o in forward.operators
    )
    sizes = {"x": 4.0, "statistics": 0.5, "rows": 0.1}
    sizes = {slot: sizes.get(slot, 4.0) for slot in {"x", *forward.written}}
    forward = replace(forward, operators=operators, bytes_per_token=sizes)
    return GraphPair(forward, graph("backward", BACKWARD, "dy", "dx"))


def _backward(pair: GraphPair) -> list[str]:
    return [
        f"{o.name}: {' '.join(o.reads)} -> {' '.join(o.writes)}".rstrip()
        for o in pair.backward.operators
    ]


def test_a_slot_is_made_again_just_before_it_is_read() -> None:
    pair = recompute(_pair(), {"whole"})
    assert _backward(pair) == [
        "act.grad: dy inner -> d_inner",
        "act.wgrad: dy outer ->",
        "gather.again: normal -> whole_again",
        "wgrad: d_inner whole_again ->",
        "norm.grad: d_inner x statistics -> dx",
    ]
    assert pair.saved == ("inner", "outer", "normal", "x", "statistics")
    assert pair.backward.bytes_per_token["whole_again"] == 4.0


def test_all_is_made_again_of_the_input_and_of_what_the_host_knows() -> None:
    pair = recompute(_pair(), chosen(_pair(), "full"))
    assert _backward(pair) == [
        "norm.again: x -> normal_again statistics_again",
        "gather.again: normal_again -> whole_again",
        "gemm.again: whole_again -> inner_again",
        "act.grad: dy inner_again -> d_inner",
        "act.again: inner_again rows -> outer_again",
        "act.wgrad: dy outer_again ->",
        "wgrad: d_inner whole_again ->",
        "norm.grad: d_inner x statistics_again -> dx",
    ]
    assert {*pair.saved} == {"x", "rows"}


def test_what_forward_has_written_over_is_made_again_as_well() -> None:
    act = Operator("act", Lane.COMPUTE, ("inner", "rows"), ("outer",), no_launch)
    act = replace(act, takes=(("outer", "inner"),))
    backward = graph("backward", BACKWARD.replace("dy inner ->", "dy ->"), "dy", "dx")
    pair = recompute(replace(_pair(act=act), backward=backward), {"outer"})
    assert _backward(pair)[1:4] == [
        "gemm.again: whole -> inner_again",
        "act.again: inner_again rows -> outer_again",
        "act.wgrad: dy outer_again ->",
    ]
    assert pair.backward.by_name["act.again"].takes == (("outer_again", "inner_again"),)


def test_a_part_is_made_again_by_itself_unless_the_whole_is() -> None:
    part = Operator("norm", Lane.COMPUTE, ("x",), ("normal", "statistics"), no_launch)
    whole = Operator("add_norm", Lane.COMPUTE, ("z",), ("x", "normal", "statistics"), no_launch)
    whole = replace(whole, remakes=(part,))
    forward = graph("forward", "add_norm compute: z -> x normal statistics", "z", "x")
    sizes = dict.fromkeys(("x", "z", "normal", "statistics"), 1.0)
    forward = replace(forward, operators=(whole,), bytes_per_token=sizes)
    text = "wgrad compute: dx normal ->\nnorm.grad compute: dx x statistics -> dz"
    pair = GraphPair(forward, graph("backward", text, "dx", "dz"))
    alone = recompute(pair, {"normal"})
    assert _backward(alone)[0] == "norm.again: x -> normal_again statistics_again"
    both = recompute(pair, {"normal", "x"})
    assert _backward(both)[0] == "add_norm.again: z -> x_again normal_again statistics_again"
    assert both.saved == ("z",)


def test_choices_name_what_they_say() -> None:
    pair = _pair()
    assert [chosen(pair, choice) for choice in CHOICES] == [
        set(),
        {"whole"},
        # Statistics are narrow, and come with the norm.
        {"normal", "whole", "outer"},
        pair.forward.written,
    ]
    assert chosen(pair, ["gathers", "inner"]) == {"whole", "inner"}
    # What is made of a slot that is not there is not light, whatever makes it.
    assert chosen(_pair(light=("gather",)), "selective") == set()
    assert of_head(["full", "logits"]) == ("gathers", "logits") and of_head("none") == ("none",)


def test_nothing_to_make_again_leaves_a_layer_as_it_is() -> None:
    pair = _pair()
    assert recompute(pair, ()) is pair
    assert recompute(pair, {"y", "x"}) is pair, "what backward does not read, and the input"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ful", r"recompute names 'ful', which no layer has: use none or .*did you mean 'full'\?"),
        (["gathers", "wole"], r"names 'wole', .* a list with some of inner, .*mean 'whole'\?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(what: str | list[str], message: str) -> None:
    slots = _pair().forward.written
    check_recompute(["full", "whole"], slots)
    with pytest.raises(ValueError, match=message):
        check_recompute(what, slots)
