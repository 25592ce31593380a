"""Built-in plans: the baselines of the field, and a default until a search has run.

A builder turns a forward graph and a backward graph, either of which may be absent, into a plan.
Time runs to the right; `F` and `B` are compute of the two strands, `f` and `b` communication:

    sequential   compute  F   F B   B
                 tp        f     b        nothing overlaps
    megatron     compute  F   F B B       only b hides, under B's own weight gradient
                 tp        f     b
    dhellam      compute  F|B|F|B|        blocks of opposite kind, a barrier after each
                 tp       b|f|b|f|
    interleaved  compute  F B F B B       waits only for slots
                 tp        f b f
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from lightning_dhellam.nearest import suggestion
from lightning_dhellam.plan.graph import Graph
from lightning_dhellam.plan.interleave import interleave
from lightning_dhellam.plan.operator import Collective, Operator, Strand
from lightning_dhellam.plan.plan import Barrier, Issue, Plan, Row

Builder = Callable[[Graph | None, Graph | None], Plan]


def sequential(forward: Graph | None, backward: Graph | None) -> Plan:
    """Forward, then backward, nothing overlapped: the reference for numerics."""
    rows: list[Row] = []
    for graph in (forward, backward):
        for operator in graph.operators if graph else ():
            rows.append(issue(graph, operator))
            if operator.moves:
                rows.append(Barrier())
    return _plan("sequential", forward, backward, rows)


def megatron(forward: Graph | None, backward: Graph | None) -> Plan:
    """Megatron's own overlap inside one micro-batch.

    Forward communication is exposed. In backward, the input of a column-parallel linear is
    gathered again under the data gradient, and the data gradient is scattered under the weight
    gradient (Megatron-core `LinearWithGradAccumulationAndAsyncCommunication`). A ring hides under
    the attention beside which it stands in the graph, in both directions (transformer-engine).
    """
    rows: list[Row] = []
    if forward is not None:
        rows.extend(_awaiting_rings(forward, _megatron_forward(forward)))
    if backward is not None:
        rows.extend(_awaiting_rings(backward, _megatron_backward(backward)))
    return _plan("megatron", forward, backward, rows)


def _megatron_forward(graph: Graph) -> Iterator[Row]:
    """All communication is exposed, but for a ring's."""
    for operator in graph.operators:
        yield issue(graph, operator)
        if operator.is_communication and not _is_of_ring(operator):
            yield Barrier()


def _awaiting_rings(graph: Graph, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, and barriers where a hop of a ring must have ended: what it brings is read, or the
    next hop begins."""
    under_way: set[str] = set()
    hiding = False
    for row in rows:
        operator = graph.by_name[row.operator] if isinstance(row, Issue) else None
        if operator is None:
            under_way.clear()
        elif under_way & {*operator.reads} or (hiding and _is_of_ring(operator)):
            yield Barrier()
            under_way.clear()
        yield row
        if operator is not None and _is_of_ring(operator):
            under_way.update(operator.writes)
        hiding = bool(under_way) and operator is not None and not operator.is_communication


def _is_of_ring(operator: Operator) -> bool:
    return operator.collective is Collective.EXCHANGE


def _megatron_backward(graph: Graph) -> Iterator[Row]:
    """Communication with a partner runs under it; all other communication is exposed.

    The partner of a gather that only weight gradients read is the data gradient of the same
    linear; the partner of any other communication is the weight gradient that stands next.
    """
    late = [o for o in graph.operators if _feeds_only_leaves(graph, o)]
    under = {_data_gradient_beside(graph, gather): gather for gather in late}
    order = list(_as_needed(graph, late, under))
    hiding = False
    for operator, following in zip(order, [*order[1:], None], strict=True):
        gather = under.get(operator.name)
        if gather:
            yield issue(graph, gather)
        yield issue(graph, operator)
        starts = operator.is_communication and following is not None and _is_leaf(following)
        exposed = operator.is_communication and not starts and not _is_of_ring(operator)
        if gather or hiding or exposed:
            yield Barrier()
        hiding = starts


def _as_needed(
    graph: Graph, late: list[Operator], under: dict[str, Operator]
) -> Iterator[Operator]:
    """The operators without the late ones; what these need is there when their partner comes."""
    there: set[str] = set()

    def before(operator: Operator) -> Iterator[Operator]:
        for name in graph.predecessors[operator.name]:
            if name not in there:
                yield from with_needs(graph.by_name[name])

    def with_needs(operator: Operator) -> Iterator[Operator]:
        yield from before(operator)
        there.add(operator.name)
        yield operator

    for operator in graph.operators:
        if operator.name in under:
            yield from before(under[operator.name])
        if operator not in late and operator.name not in there:
            there.add(operator.name)
            yield operator


def _is_leaf(operator: Operator) -> bool:
    """Whether nothing waits for it: a weight gradient."""
    return not operator.writes and not operator.is_communication


def _feeds_only_leaves(graph: Graph, operator: Operator) -> bool:
    readers = [o for o in graph.operators if set(o.reads) & set(operator.writes)]
    return operator.is_communication and bool(readers) and all(map(_is_leaf, readers))


def _data_gradient_beside(graph: Graph, gather: Operator) -> str:
    """The first operator that reads the same gradient as the weight gradient behind `gather`."""
    leaf = next(o for o in graph.operators if set(o.reads) & set(gather.writes))
    shared = set(leaf.reads) - set(gather.writes)
    return next(o.name for o in graph.operators if o is leaf or set(o.reads) & shared)


def dhellam(forward: Graph | None, backward: Graph | None) -> Plan:
    """The published scheme: blocks of the two strands in pairs, a barrier after each pair.

    A block is a longest run of operators of one kind, compute or communication. Blocks are
    paired so that one strand communicates while the other computes (DHelix, arXiv 2411.15871,
    section 4; its dynamic programme over measured pairs needs a profile).
    """
    queues = {
        Strand.FORWARD: _blocks(forward),
        Strand.BACKWARD: _blocks(backward),
    }
    rows: list[Row] = []
    turn = Strand.FORWARD
    while queues[Strand.FORWARD] or queues[Strand.BACKWARD]:
        other = Strand.BACKWARD if turn is Strand.FORWARD else Strand.FORWARD
        first, second = queues[turn], queues[other]
        if first and second and first[0][0] == second[0][0]:
            chosen = [first.pop(0)]
        else:
            chosen = [queue.pop(0) for queue in (first, second) if queue]
        chosen.sort(key=lambda block: not block[0])
        rows.extend(row for _, block in chosen for row in block)
        rows.append(Barrier())
        turn = other
    return _plan("dhellam", forward, backward, rows)


def _blocks(graph: Graph | None) -> list[tuple[bool, list[Issue]]]:
    """Runs of one kind: `(is communication, rows)`."""
    if graph is None:
        return []
    runs = groupby(graph.operators, key=lambda operator: operator.is_communication)
    return [(kind, [issue(graph, operator) for operator in run]) for kind, run in runs]


def interleaved(forward: Graph | None, backward: Graph | None) -> Plan:
    """A fixed order from nominal costs: the default until a search has run.

    No barriers: an operator waits only for its slots, and a layer's first gather may run under
    the previous layer's last GEMM. Where no bytes move, nothing is to be hidden: then
    backward follows forward, so that in a pipeline one of them goes to the next stage early.
    """
    graphs = [graph for graph in (forward, backward) if graph]
    if any(graph.moves for graph in graphs):
        order = interleave(graphs)
    else:
        order = [(graph, operator) for graph in graphs for operator in graph.operators]
    return _plan("interleaved", forward, backward, [issue(graph, o) for graph, o in order])


BUILDERS: dict[str, Builder] = {
    "sequential": sequential,
    "megatron": megatron,
    "dhellam": dhellam,
    "interleaved": interleaved,
}


def builder(name: str) -> Builder:
    """The built-in plan of that name. An unknown name is answered with the known ones."""
    if name not in BUILDERS:
        raise ValueError(
            f"plan='{name}' is not a known plan: use one of {list(BUILDERS)}, 'auto' to search the"
            f" best, or the path of a plan file that ends in .json" + suggestion(name, BUILDERS)
        )
    return BUILDERS[name]


def issue(graph: Graph | None, operator: Operator) -> Issue:
    """The row that issues `operator` of `graph`."""
    assert graph is not None
    return Issue(graph.direction, operator.lane, operator.name)


def _plan(name: str, forward: Graph | None, backward: Graph | None, rows: list[Row]) -> Plan:
    return Plan(
        name,
        forward.name if forward else None,
        backward.name if backward else None,
        tuple(rows),
    )
