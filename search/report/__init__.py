"""What a search shows: tables, traces, and folders with all of it; pictures on demand."""

from lightning_dhellam.search.report.findings import Findings
from lightning_dhellam.search.report.offers import Offer
from lightning_dhellam.search.report.outcomes import (
    Outcome,
    choose,
    measured,
    summary,
    time_text,
)
from lightning_dhellam.search.report.pipeline_table import comparison_table, save_comparison
from lightning_dhellam.search.report.schedules import Walked
from lightning_dhellam.search.report.trace import save_trace

__all__ = [
    "Findings",
    "Offer",
    "Outcome",
    "Walked",
    "choose",
    "comparison_table",
    "measured",
    "save_comparison",
    "save_trace",
    "summary",
    "time_text",
]
