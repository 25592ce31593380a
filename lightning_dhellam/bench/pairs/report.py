"""The table of `dhellam bench pairs`: a row for each collective, a column for each computation."""

from __future__ import annotations

import numpy as np

from lightning_dhellam.bench.report import Report, Row
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.report.pictures import hidden_shares

LEAST = 0.02
"""Share of the longest compute operator below which one hides little of anything."""


def report_of(profile: Profile, notes: Row) -> Report:
    """The table of a profile, with the compute operators that take some time."""
    alone = {row.operator: row.median for row in profile.timings if row.partner is None}
    collectives, computes, shares = hidden_shares(profile)
    longest = max(alone[key] for key in computes)
    kept = [j for j, key in enumerate(computes) if alone[key] >= LEAST * longest]
    names = {j: computes[j].rsplit("/", 1)[-1] for j in kept}
    columns = ("collective", "alone us", *names.values())
    report = Report("pairs", profile.fingerprint.device.partition(",")[0], columns, notes)
    times = {names[j]: alone[computes[j]] * 1e6 for j in kept}
    report.rows.append({"collective": "(alone us)", **times})
    slowdowns = Costs.of(profile).slowdowns
    for i, key in enumerate(collectives):
        row: Row = {"collective": key.rsplit("/", 1)[-1], "alone us": alone[key] * 1e6}
        row |= {names[j]: float(shares[i, j]) for j in kept if not np.isnan(shares[i, j])}
        row["slowdowns"] = {b: pair for (a, b), pair in slowdowns.items() if a == key}
        report.rows.append(row)
    return report
