"""Graphs as data: enough of them to plan and to simulate, not to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_dhellam.plan import Collective, Graph, Lane, Operator, Strand


def fields_of(graph: Graph) -> dict[str, Any]:
    """Return what a JSON file holds of a graph."""
    return {
        "name": graph.name,
        "direction": str(graph.direction),
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "operators": [
            {
                "name": o.name,
                "lane": str(o.lane),
                "reads": list(o.reads),
                "writes": list(o.writes),
                "cost": o.cost,
                "shrinks": o.shrinks,
                "waits": o.waits,
                "varies": o.varies,
                "takes": [list(slots) for slots in o.takes],
                "collective": o.collective,
                "fp8": o.fp8,
            }
            for o in graph.operators
        ],
        "bytes_per_token": dict(graph.bytes_per_token),
    }


def graph_from(fields: Mapping[str, Any]) -> Graph:
    """Make the graph of such fields. Its operators have names, lanes, slots and costs, no kernels.

    Raises:
        KeyError, TypeError, ValueError: fields are missing or malformed.
    """
    operators = tuple(
        Operator(
            row["name"],
            Lane(row["lane"]),
            tuple(row["reads"]),
            tuple(row["writes"]),
            _no_kernel,
            float(row["cost"]),
            shrinks=bool(row.get("shrinks", False)),
            waits=bool(row.get("waits", False)),
            varies=bool(row.get("varies", False)),
            takes=tuple((write, read) for write, read in row.get("takes", ())),
            collective=Collective(row["collective"]) if row.get("collective") else None,
            fp8=row.get("fp8", ""),
        )
        for row in fields["operators"]
    )
    return Graph(
        fields["name"],
        Strand(fields["direction"]),
        operators,
        tuple(fields["inputs"]),
        tuple(fields["outputs"]),
        {slot: float(size) for slot, size in fields["bytes_per_token"].items()},
    )


def _no_kernel(*values: Any) -> None:
    raise AssertionError("this graph was read from a file: its operators have no kernels")
