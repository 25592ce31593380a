"""What was predicted, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_dhellam.search.cluster import Advice, Prediction
from lightning_dhellam.search.report.outcomes import time_text

_GIB = 2**30


def prediction_text(found: Prediction) -> str:
    """Return a prediction as lines: the step, its lanes, its stages, what was assumed."""
    lines = [
        f"{found.model} on {found.cluster}: {found.choice.ranks} × {found.device}, {found.choice}",
        f"step {time_text(found.seconds)} ({time_text(found.low)} to {time_text(found.high)}),"
        f" {found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}, bubble {found.bubble:.1%}",
        "",
    ]
    rows = [["lane", "ranks", "network", "busy", "exposed", "of the step"]]
    for name, use in found.lanes.items():
        if name != "compute":
            share = f"{use.exposed / found.seconds:.1%}"
            busy, exposed = time_text(use.busy), time_text(use.exposed)
            rows.append([name, str(use.ranks), use.level or "-", busy, exposed, share])
    lines += _table(rows) if rows[1:] else ["no lane communicates"]
    parts = ("compute", "exposed", "transfer", "bubble", "reduction", "optimizer")
    rows = [["stage", "ranks", *parts, "memory"]]
    for stage in found.stages:
        times = [time_text(getattr(stage, part)) for part in parts]
        memory = f"{stage.bytes / _GIB:.1f} GiB" if stage.memory else "-"
        rows.append([str(stage.stage), str(stage.ranks), *times, memory])
    lines += ["", *_table(rows)]
    if found.stages[0].memory:
        verdict = "fits" if found.fits else "DOES NOT FIT"
        limit = f"{found.memory_limit / _GIB:.1f} GiB"
        lines.append(f"memory: {found.bytes / _GIB:.1f} GiB of {limit}: {verdict}")
    total = sum(found.origins.values())
    shares = (f"{seconds / total:.0%} {origin}" for origin, seconds in found.origins.items())
    lines += [f"operators' times: {', '.join(shares)}", *(f"- {note}" for note in found.notes)]
    return "\n".join(lines)


def advice_text(advice: Advice) -> str:
    """Return the candidates of an advice as a table, and why others are not among them."""
    split = any(one.prediction.choice.etp != one.prediction.choice.tp for one in advice.candidates)
    names = ["tp", "cp", "ep", *(["etp"] if split else []), "pp", "dp"]
    eight = any(one.prediction.choice.fp8 for one in advice.candidates)
    bits = ["fp8"] if eight else []
    head = ["", *names, "micro", "schedule", "recompute", *bits, "plan"]
    rows = [[*head, "step", "from", "to", "MFU", "GiB", "why not"]]
    for number, one in enumerate(advice.candidates):
        found, choice = one.prediction, one.prediction.choice
        sizes = [str(getattr(choice, name)) for name in names]
        times = [time_text(seconds) for seconds in (found.seconds, found.low, found.high)]
        memory = f"{found.bytes / _GIB:.1f}" if found.stages[0].memory else "-"
        rows.append(
            [
                "*" if number == 0 else "",
                *sizes,
                f"{choice.micro_batches} × {choice.micro_batch_size}",
                choice.schedule if choice.pp > 1 else "-",
                choice.recompute,
                *([choice.fp8 or "-"] if eight else []),
                found.plan or choice.plan,
                *times,
                f"{found.mfu:.1%}",
                memory,
                one.reason,
            ]
        )
    refused = [f"  {count:>6,} {reason}" for reason, count in advice.refused.items()]
    return "\n".join(
        [
            *_table(rows),
            f"{advice.looked_at:,} choices in {advice.seconds:.0f} s, {advice.played:,} of them"
            " played; of the others",
            *refused,
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Iterable[str]) -> str:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
