"""Operators, graphs and plans as plain values. Imports no torch."""

from lightning_dhellam.plan.agreement import LayoutError
from lightning_dhellam.plan.builders import BUILDERS, Builder, builder
from lightning_dhellam.plan.graph import (
    BATCH_PREFIX,
    BEGIN,
    SHARED,
    STEP_PREFIX,
    Ends,
    Graph,
    GraphPair,
    Kind,
    check_chain,
    kind_of,
)
from lightning_dhellam.plan.layout import Layout
from lightning_dhellam.plan.operator import Collective, Lane, Operator, Strand, Track
from lightning_dhellam.plan.plan import Barrier, Issue, Plan, PlanError
from lightning_dhellam.plan.validate import validate

__all__ = [
    "BATCH_PREFIX",
    "BEGIN",
    "BUILDERS",
    "SHARED",
    "STEP_PREFIX",
    "Barrier",
    "Builder",
    "Collective",
    "Ends",
    "Graph",
    "GraphPair",
    "Issue",
    "Kind",
    "Lane",
    "Layout",
    "LayoutError",
    "Operator",
    "Plan",
    "PlanError",
    "Strand",
    "Track",
    "builder",
    "check_chain",
    "kind_of",
    "validate",
]
