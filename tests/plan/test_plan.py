"""Plans print and parse back; every kind of invalid plan is refused with an arrow at the row."""

from __future__ import annotations

import pytest

from lightning_dhellam.plan import BUILDERS, Barrier, Issue, Lane, Plan, PlanError, Strand, validate
from tests.plan.graphs import random_builder, toy_pair
from tests.plan.real_graphs import lowered

TEXT = """\
plan mine: forward toy, backward -
  0  forward   compute  norm
  1  forward   tp       gather
  -  barrier
  2  forward   compute  gemm
  3  forward   tp       scatter"""


def test_a_plan_prints_as_a_table_and_parses_back() -> None:
    plan = Plan(
        "mine",
        "toy",
        None,
        (
            Issue(Strand.FORWARD, Lane.COMPUTE, "norm"),
            Issue(Strand.FORWARD, Lane.TP, "gather"),
            Barrier(),
            Issue(Strand.FORWARD, Lane.COMPUTE, "gemm"),
            Issue(Strand.FORWARD, Lane.TP, "scatter"),
        ),
    )
    assert str(plan) == TEXT
    assert Plan.parse(TEXT) == plan
    assert Plan.parse(f"\n{TEXT}\n\n") == plan
    assert [issue.operator for issue in plan.issues] == ["norm", "gather", "gemm", "scatter"]
    validate(plan, toy_pair().forward, None)


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_round_trip_of_built_in_and_random_plans(tensor_parallel_size: int) -> None:
    layers = lowered(tensor_parallel_size).layers
    builders = [*BUILDERS.values(), *(random_builder(seed) for seed in range(50))]
    seen = set()
    for build in builders:
        for forward, backward in ((0, -1), (1, 1), (1, None), (None, -1)):
            ahead = layers[forward].forward if forward is not None else None
            behind = layers[backward].backward if backward is not None else None
            plan = build(ahead, behind)
            validate(plan, ahead, behind)
            assert Plan.parse(str(plan)) == plan
            seen.add(plan.digest)
    assert len(seen) > 100


def test_the_digest_tells_orders_apart() -> None:
    plan = Plan.parse(TEXT)
    assert plan.digest == Plan.parse(TEXT).digest
    other = TEXT.replace("  -  barrier\n", "")
    assert plan.digest != Plan.parse(other).digest


NOT_PLANS = {
    "expected 'plan NAME: forward GRAPH, backward GRAPH'": (0, "plan mine forward toy"),
    "expected 'NUMBER STRAND LANE OPERATOR' or '- barrier'": (2, "  1  forward  gather"),
    "row number 7, expected 1": (2, "  7  forward   tp       gather"),
    "strand 'sideways', expected 'forward' or 'backward'": (2, "  1  sideways  tp       gather"),
    f"lane 'nvlink', expected {' or '.join(repr(str(lane)) for lane in Lane)}": (
        2,
        "  1  forward   nvlink   gather",
    ),
    "row number 3, expected 2": (3, "  3  forward   compute  again"),
}


@pytest.mark.parametrize("remark", NOT_PLANS)
def test_text_that_is_no_plan_is_refused_with_an_arrow(remark: str) -> None:
    at, line = NOT_PLANS[remark]
    lines = TEXT.splitlines()
    lines[at] = line
    with pytest.raises(PlanError) as error:
        Plan.parse("\n".join(lines))
    lines[at] = f"{line}   <-- {remark}"
    assert str(error.value) == "\n".join([f"not a plan: {remark}", *lines])


def test_a_barrier_needs_its_dash_and_empty_text_is_no_plan() -> None:
    with pytest.raises(PlanError, match=r"\n  barrier   <-- expected 'NUMBER STRAND"):
        Plan.parse(TEXT.replace("  -  barrier", "  barrier"))
    with pytest.raises(PlanError, match=r"not a plan: .*\n\(empty text\)"):
        Plan.parse(" \n")


INVALID = {
    "no operator 'gemv' in graph 'toy forward'": (
        ["norm", "gather", "gemv", "scatter"],
        "  2  forward   compute  gemv",
    ),
    "'gather' runs on lane 'tp'": (
        ["norm", "gather@compute", "gemm", "scatter"],
        "  1  forward   compute  gather",
    ),
    "forward operator 'gather' is issued twice": (
        ["norm", "gather", "gather", "gemm", "scatter"],
        "  2  forward   tp       gather",
    ),
    "'gemm' needs 'gather' issued before it": (
        ["norm", "gemm", "gather", "scatter"],
        "  1  forward   compute  gemm",
    ),
}
LANES = {"norm": Lane.COMPUTE, "gather": Lane.TP, "gemm": Lane.COMPUTE, "scatter": Lane.TP}


def _plan_of(words: list[str]) -> Plan:
    rows = []
    for word in words:
        name, _, lane = word.partition("@")
        lane = lane or LANES.get(name, Lane.COMPUTE)
        rows.append(Issue(Strand.FORWARD, Lane(lane), name))
    return Plan("mine", "toy", None, tuple(rows))


@pytest.mark.parametrize("remark", INVALID)
def test_a_plan_that_does_not_fit_is_refused_with_an_arrow(remark: str) -> None:
    words, row = INVALID[remark]
    plan = _plan_of(words)
    with pytest.raises(PlanError) as error:
        validate(plan, toy_pair().forward, None)
    assert str(plan).count(f"{row}") >= 1
    head, tail = str(plan).rsplit(row, 1)
    expected = f"invalid plan: {remark}\n{head}{row}   <-- {remark}{tail}"
    assert str(error.value) == expected


LAGGING = """\
plan mine: forward -, backward toy
  0  backward  compute  wgrad (previous)
  1  backward  tp       grad_gather
  2  backward  tp       regather
  3  backward  compute  dgrad
  -  barrier
  4  backward  tp       grad_scatter
  5  backward  compute  norm.grad"""


def test_work_that_nobody_waits_for_may_be_left_to_the_next_pair() -> None:
    plan = Plan.parse(LAGGING)
    assert str(plan) == LAGGING
    assert [row.lag for row in plan.issues] == [1, 0, 0, 0, 0, 0]
    validate(plan, None, toy_pair().backward)
    both = LAGGING.replace("regather", "regather (previous)")
    with pytest.raises(PlanError, match="'wgrad' needs 'regather' issued before it"):
        validate(Plan.parse(both), None, toy_pair().backward)


def test_communication_may_go_first_and_computation_may_not() -> None:
    text = LAGGING.replace("grad_scatter", "grad_scatter (first)")
    plan = Plan.parse(text)
    assert str(plan) == text
    assert [row.operator for row in plan.issues if row.first] == ["grad_scatter"]
    assert plan.digest != Plan.parse(LAGGING).digest
    validate(plan, None, toy_pair().backward)
    text = LAGGING.replace("(previous)", "(previous) (first)")
    assert str(Plan.parse(text)) == text
    with pytest.raises(PlanError, match="'wgrad' computes: only communication can go first"):
        validate(Plan.parse(text), None, toy_pair().backward)


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        ("regather", "'regather' lags, but 'wgrad' reads it in its own pair"),
        ("norm.grad", "'norm.grad' writes the output 'dx'"),
        ("dgrad", "'dgrad' lags, but 'grad_scatter' reads it in its own pair"),
    ],
)
def test_work_that_its_own_pair_needs_may_not_be_left(row: str, remark: str) -> None:
    text = LAGGING.replace(" (previous)", "")
    order = [0, 2, 3, 4, 5, 6, 7]  # `wgrad` moves behind what it reads.
    lines = text.splitlines()
    first = lines[1]
    lines = [lines[i] for i in order] + [first]
    issued = 0
    for index, line in enumerate(lines):
        if index and "barrier" not in line:
            lines[index] = f"{issued:>3}{line[3:]}"
            issued += 1
    validate(Plan.parse("\n".join(lines)), None, toy_pair().backward)
    at = next(index for index, line in enumerate(lines) if line.endswith(f"  {row}"))
    lines[at] += " (previous)"
    with pytest.raises(PlanError) as error:
        validate(Plan.parse("\n".join(lines)), None, toy_pair().backward)
    lines[at] += f"   <-- {remark}"
    assert str(error.value) == "\n".join([f"invalid plan: {remark}", *lines])


def test_a_missing_operator_is_pointed_at_behind_the_last_row() -> None:
    with pytest.raises(PlanError) as error:
        validate(_plan_of(["norm", "gather", "gemm"]), toy_pair().forward, None)
    assert (
        str(error.value)
        == """\
invalid plan: forward operator 'scatter' is never issued
plan mine: forward toy, backward -
  0  forward   compute  norm
  1  forward   tp       gather
  2  forward   compute  gemm
     <-- forward operator 'scatter' is never issued"""
    )


def test_an_operator_of_an_absent_strand_is_refused() -> None:
    plan = Plan.parse(f"{TEXT}\n  4  backward  compute  dgrad")
    with pytest.raises(PlanError, match=r"dgrad   <-- no operator 'dgrad' without a backward stra"):
        validate(plan, toy_pair().forward, None)


def test_the_same_operator_name_in_both_strands_is_two_operators() -> None:
    pair = toy_pair()
    plan = random_builder(0)(pair.forward, pair.backward)
    validate(plan, pair.forward, pair.backward)
    with pytest.raises(PlanError, match="no operator 'norm' in graph 'toy backward'"):
        validate(
            Plan("p", "toy", "toy", (Issue(Strand.BACKWARD, Lane.COMPUTE, "norm"),)),
            pair.forward,
            pair.backward,
        )


def test_a_plan_of_other_graphs_is_refused_with_an_arrow_at_the_header() -> None:
    plan = Plan.parse(TEXT)
    pair = toy_pair()
    for forward, backward, remark in (
        (None, None, "made for forward graph 'toy', used with 'None'"),
        (pair.forward, pair.backward, "made for backward graph 'None', used with 'toy'"),
    ):
        with pytest.raises(PlanError) as error:
            validate(plan, forward, backward)
        lines = str(error.value).splitlines()
        assert lines[0] == f"invalid plan: {remark}"
        assert lines[1] == f"plan mine: forward toy, backward -   <-- {remark}"
        assert lines[2:] == TEXT.splitlines()[1:]
