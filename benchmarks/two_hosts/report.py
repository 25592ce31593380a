"""The table of the two-hosts benchmark: a row for each side at each rate."""

from __future__ import annotations

from typing import Any

from benchmarks.two_hosts.settings import MEGATRON_CORE
from lightning_dhellam.bench.report import Row

COLUMNS = (
    "Gbit/s", "achieved", "side", "step s", "spread", "over sequential", "over megatron-core",
    "of bound", "cpu s", "predicted s", "error", "parity",
)  # fmt: skip


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of what a host has reported of one rate."""
    sides = {side["side"]: side for side in result["sides"]}
    return [_row(side, sides, result) for side in result["sides"]]


def note_of(result: dict[str, Any]) -> str:
    """What else is to be said about one rate."""
    bound = _bound(result)
    return (
        f"compute {result['compute']:.3f} s, link {result['link']:.3f} s, so the bound is"
        f" {bound:.3f} s; limit of the plan: {result['resource']}; other processes took"
        f" {result['others']:.0%} of the processors"
    )


def _bound(result: dict[str, Any]) -> float:
    return float(max(result["compute"], result["link"]))


def _row(side: Row, sides: dict[str, Row], result: dict[str, Any]) -> Row:
    seconds, predicted = side["seconds"], side["predicted"]
    theirs = sides.get(MEGATRON_CORE)
    return {
        "Gbit/s": result["rate"],
        "achieved": result["achieved"],
        "side": side["side"],
        "step s": seconds,
        "spread": side["spread"],
        "over sequential": sides["sequential"]["seconds"] / seconds,
        "over megatron-core": theirs["seconds"] / seconds if theirs else None,
        "of bound": _bound(result) / seconds,
        "cpu s": side["cpu"],
        "predicted s": predicted,
        "error": predicted / seconds - 1 if predicted is not None else None,
        "parity": side["parity"],
        "compute s": result["compute"],
        "link s": result["link"],
    }
