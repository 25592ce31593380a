"""The tables of `dhellam bench published`: gains, what is assumed, and why they are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_dhellam.bench.published.cases import Case
from lightning_dhellam.bench.report import Report, Row
from lightning_dhellam.models import parameter_count, training_flops_per_token
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.search.cluster import Prediction

COLUMNS = (
    "case", "published", "pairs", "dhellam", "auto", "sequential", "published TFLOP/s",
    "megatron TFLOP/s", "auto TFLOP/s", "megatron s", "from", "to",
)  # fmt: skip
LIMITS = (
    "published gains are upper bounds: the successor's authors found that the original code had"
    " computed zero gradients; all else is predicted, not measured: rates of plans over megatron's,"
    " and TFLOP/s of a GPU, attention counted as in the published ones"
)
ASSUMED, SPENT, APART = "assumptions", "percent of a step", "pairs beside the published gain"
_COMPARED = ("megatron", "pairs", "auto")
_LANES = ("tp", "cp", "ep")
_PARTS = ("compute", "exposed", "transfer", "bubble", "reduction", "optimizer")
_CLOSE = 0.03
"""How far a gain may be from the published one without being apart."""


def add(report: Report, case: Case, found: Mapping[str, Prediction]) -> None:
    """Add what was predicted of a case to all tables."""
    base = found["megatron"]
    gains = {plan: base.seconds / step.seconds for plan, step in found.items()}
    report.rows.append(
        {
            "case": case.name,
            "published": case.gain,
            **{plan: gain for plan, gain in gains.items() if plan != "megatron"},
            "published TFLOP/s": case.rate,
            "megatron TFLOP/s": _rate(base, case),
            "auto TFLOP/s": _rate(found["auto"], case),
            "megatron s": base.seconds,
            "from": base.low,
            "to": base.high,
        }
    )
    tables = report.details
    tables.setdefault(ASSUMED, []).append(_assumed(case, found["dhellam"]))
    spent = tables.setdefault(SPENT, [])
    spent.extend({"case": case.name, "plan": plan} | _spent(step) for plan, step in found.items())
    tables[APART] = reasons(report.rows, spent)


def _rate(step: Prediction, case: Case) -> float:
    """TFLOP/s of a GPU, counted as the published ones are."""
    device = Cluster.load(case.cluster).device
    assert device is not None
    halved = training_flops_per_token(case.config, case.length)
    # Half of attention over twice as many tokens is all of it.
    counted = training_flops_per_token(case.config, 2 * case.length) if case.whole else halved
    return step.mfu * device.flops / 1e12 * counted / halved


def _assumed(case: Case, step: Prediction) -> Row:
    config, networks = case.config, Cluster.load(case.cluster).networks
    assert networks is not None
    between = networks.between
    return {
        "case": case.name,
        "parameters, 1e9": parameter_count(config) / 1e9,
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "heads": config.num_attention_heads,
        "groups": config.num_query_groups,
        "tokens": case.length,
        "micro-batches": f"{step.choice.micro_batches} × {step.choice.micro_batch_size}",
        **{name: getattr(step.choice, name) for name in ("tp", "cp", "ep", "pp", "dp")},
        "cluster": case.cluster,
        "inside GB/s": networks.inside.bandwidth / 1e9,
        "between GB/s": None if between is None else between.bandwidth / 1e9,
        "adapters": networks.adapters,
        "GiB": step.bytes / 2**30,
        "of": step.memory_limit / 2**30,
        "assumed": case.assumed,
    }


def _spent(step: Prediction) -> Row:
    """Shares of a step by what stages do, their mean, and what lanes expose."""
    parts: dict[str, Any] = {
        part: 100
        * sum(getattr(stage, part) for stage in step.stages)
        / len(step.stages)
        / step.seconds
        for part in _PARTS
    }
    lanes = {f"exposed {name}": 0.0 for name in _LANES}
    for name, use in step.lanes.items():
        if name in _LANES:
            lanes[f"exposed {name}"] = 100 * use.exposed / step.seconds
    return {"schedule": step.choice.schedule if step.choice.pp > 1 else "-"} | parts | lanes


def reasons(rows: Iterable[Row], spent: Iterable[Row]) -> list[Row]:
    """Return the table of why gains are not the published ones.

    Args:
        rows: of gains, a row for each case.
        spent: what the steps of all plans of these cases are spent on.
    """
    steps = {(step["case"], step["plan"]): step for step in spent}
    return [
        {key: row[key] for key in ("case", "published", "pairs")}
        | {"why": explained(row, {plan: steps[row["case"], plan] for plan in _COMPARED})}
        for row in rows
    ]


def explained(row: Row, spent: Mapping[str, Row]) -> str:
    """Say by what steps are spent on why the gain of `pairs` is not the published one.

    Args:
        row: of a case, with its gains and rates.
        spent: what the steps of `megatron`, `pairs` and `auto` are spent on, in percent.
    """
    gain, published = row["pairs"], row["published"]
    before = {part: spent["megatron"][part] / 100 for part in _PARTS}
    # All as shares of the baseline's step, so that they add up to what is gained.
    saved = {part: before[part] - spent["pairs"][part] / 100 / gain for part in _PARTS}
    needed, reached = 1 - 1 / published, 1 - 1 / gain
    text = (
        f"of megatron's step {before['exposed']:.0%} is exposed communication of layers"
        f" ({_lanes(spent['megatron'])}), of which pairs hide {saved['exposed']:.0%};"
        f" {_changed(saved)}; the published gain takes {needed:.0%} of a step, this one"
        f" {reached:.0%}"
    )
    beside = _beside_their_bar(row, before["exposed"])
    if abs(gain / published - 1) <= _CLOSE:
        return f"as published: {text}{beside}"
    if gain > published:
        reason = "so small a gain needs a baseline that exposed less, or a plan that hid less"
    elif before["exposed"] < needed:
        reason = (
            "less is exposed than the published one takes: that gain needs a baseline that exposed"
            " more"
        )
    else:
        left = before["exposed"] - saved["exposed"]
        whatever = min(left, spent["auto"]["exposed"] / 100 / row["auto"])
        reason = (
            f"pairs leave {left:.0%} exposed and auto, which has no barriers between them,"
            f" {whatever:.0%}, so barriers leave {left - whatever:.0%}: that gain needs pairs that"
            " hid more, or a baseline that exposed more"
        )
    return f"{text}: {reason}{beside}"


def _lanes(step: Row) -> str:
    """What lanes expose, no more in sum than all of it: theirs is of the busiest rank, while that
    is a mean of stages."""
    shares = {name: step[f"exposed {name}"] / 100 for name in _LANES}
    whole = step["exposed"] / 100
    scale = min(1.0, whole / max(sum(shares.values()), 1e-9))
    shown = [f"{name} {scale * share:.0%}" for name, share in shares.items() if share > 0.005]
    return ", ".join(shown) or "none"


def _changed(saved: Mapping[str, float]) -> str:
    """What else is longer or shorter, if it counts."""
    others = [
        f"{part} takes {abs(share):.0%} {'less' if share > 0 else 'more'}"
        for part, share in saved.items()
        if part != "exposed" and abs(share) >= 0.005
    ]
    return ", ".join(others) or "nothing else changes"


def _beside_their_bar(row: Row, exposed: float) -> str:
    """How fast the baseline is beside the published one, and whether waiting can be why."""
    bar, rate = row["published TFLOP/s"], row["megatron TFLOP/s"]
    if bar is None:
        return ""
    text = f"; megatron is predicted {_than(rate / bar)} than their bar"
    if rate >= bar:
        return text
    return f"{text}, and if nothing were exposed {_than(rate / bar / (1 - exposed))}"


def _than(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} {'faster' if ratio > 1 else 'slower'}"
