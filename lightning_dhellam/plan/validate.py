"""Whether a plan issues every operator of its graphs exactly once, after what it reads."""

from __future__ import annotations

from lightning_dhellam.plan.graph import Graph
from lightning_dhellam.plan.operator import Strand
from lightning_dhellam.plan.plan import Issue, Plan


def validate(plan: Plan, forward: Graph | None, backward: Graph | None) -> None:
    """Refuse a plan that cannot run these graphs.

    Raises:
        PlanError: with the table and an arrow at the first bad row.
    """
    graphs = {Strand.FORWARD: forward, Strand.BACKWARD: backward}
    for strand, named in ((Strand.FORWARD, plan.forward), (Strand.BACKWARD, plan.backward)):
        graph = graphs[strand]
        actual = graph.name if graph else None
        if named != actual:
            raise plan.error(-1, f"made for {strand} graph '{named}', used with '{actual}'")
    done: dict[Strand, set[str]] = {strand: set() for strand in Strand}
    lagging = {(row.strand, row.operator) for row in plan.issues if row.lag}
    for index, row in enumerate(plan.rows):
        if isinstance(row, Issue):
            _check_row(plan, index, row, graphs[row.strand], done[row.strand], lagging)
            done[row.strand].add(row.operator)
    for strand, graph in graphs.items():
        missing = [o.name for o in graph.operators if o.name not in done[strand]] if graph else []
        if missing:
            raise plan.error(len(plan.rows), f"{strand} operator '{missing[0]}' is never issued")


def _check_row(
    plan: Plan,
    index: int,
    row: Issue,
    graph: Graph | None,
    done: set[str],
    lagging: set[tuple[Strand, str]],
) -> None:
    operator = graph.by_name.get(row.operator) if graph else None
    if graph is None or operator is None:
        where = f"in graph '{graph}'" if graph else f"without a {row.strand} strand"
        raise plan.error(index, f"no operator '{row.operator}' {where}")
    if row.lane is not operator.lane:
        raise plan.error(index, f"'{row.operator}' runs on lane '{operator.lane}'")
    if row.first and not operator.is_communication:
        raise plan.error(index, f"'{row.operator}' computes: only communication can go first")
    if row.spare and not operator.shrinks:
        raise plan.error(index, f"'{row.operator}' is no GEMM: only those leave processors free")
    if row.operator in done:
        raise plan.error(index, f"{row.strand} operator '{row.operator}' is issued twice")
    if row.lag:
        _check_lag(plan, index, row, graph, lagging)
    for name in graph.predecessors[row.operator]:
        # A lagging row's operands that do not lag themselves were issued with the previous pair.
        early = row.lag and (row.strand, name) not in lagging
        if name not in done and not early:
            raise plan.error(index, f"'{row.operator}' needs '{name}' issued before it")


def _check_lag(
    plan: Plan, index: int, row: Issue, graph: Graph, lagging: set[tuple[Strand, str]]
) -> None:
    """Only what this pair does not need may be left for the next one."""
    handed_over = set(graph.by_name[row.operator].writes) & set(graph.outputs)
    if handed_over:
        raise plan.error(index, f"'{row.operator}' writes the output '{min(handed_over)}'")
    for name in graph.followers[row.operator]:
        if (row.strand, name) not in lagging:
            raise plan.error(index, f"'{row.operator}' lags, but '{name}' reads it in its own pair")
