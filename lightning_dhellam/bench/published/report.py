"""The tables of `dhellam bench published`: gains, what is assumed, and why they are apart."""

from __future__ import annotations

from collections.abc import Mapping
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
    why = explained(case, base, found["pairs"])
    row = {"case": case.name, "published": case.gain, "pairs": gains["pairs"], "why": why}
    tables.setdefault(APART, []).append(row)


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
    parts: dict[str, Any] = {part: 100 * share for part, share in _shares(step).items()}
    lanes = {f"exposed {name}": 0.0 for name in _LANES}
    for name, use in step.lanes.items():
        if name in _LANES:
            lanes[f"exposed {name}"] = 100 * use.exposed / step.seconds
    return {"schedule": step.choice.schedule if step.choice.pp > 1 else "-"} | parts | lanes


def _shares(step: Prediction) -> dict[str, float]:
    return {
        part: sum(getattr(stage, part) for stage in step.stages) / len(step.stages) / step.seconds
        for part in _PARTS
    }


def explained(case: Case, base: Prediction, step: Prediction) -> str:
    """Say from the lanes of two predictions why a gain is not the published one.

    Args:
        case: with the published gain.
        base: under the plan of the baseline.
        step: under the plan whose gain it is.
    """
    gain = base.seconds / step.seconds
    before, after = _shares(base), _shares(step)
    # All as shares of the baseline's step, so that they add up to what is gained.
    saved = {part: before[part] - after[part] / gain for part in _PARTS}
    needed = 1 - 1 / case.gain
    lanes = ", ".join(
        f"{name} {use.exposed / base.seconds:.0%}"
        for name, use in base.lanes.items()
        if name in _LANES and use.exposed > 0.005 * base.seconds
    )
    text = (
        f"of megatron's step {before['exposed']:.0%} is exposed communication of layers"
        f" ({lanes or 'none'}), of which pairs hide {saved['exposed']:.0%}; {_changed(saved)};"
        f" the published gain takes {needed:.0%} of a step, this one {1 - 1 / gain:.0%}"
    )
    if abs(gain / case.gain - 1) <= _CLOSE:
        return f"as published: {text}"
    if gain > case.gain:
        reason = "their baseline exposed less than is predicted here, or their plan hid less of it"
    elif before["exposed"] < needed:
        reason = "there is less to hide here than that gain takes: their baseline exposed more"
    else:
        left = before["exposed"] - saved["exposed"]
        reason = f"barriers between pairs leave {left:.0%} exposed here"
    return f"{text}: {reason}{_beside_their_bar(case, base)}"


def _changed(saved: Mapping[str, float]) -> str:
    """What else is longer or shorter, if it counts."""
    others = [
        f"{part} takes {abs(share):.0%} {'less' if share > 0 else 'more'}"
        for part, share in saved.items()
        if part != "exposed" and abs(share) >= 0.005
    ]
    return ", ".join(others) or "nothing else changes"


def _beside_their_bar(case: Case, base: Prediction) -> str:
    if case.rate is None:
        return ""
    apart = _rate(base, case) / case.rate - 1
    word = "faster" if apart > 0 else "slower"
    return f"; megatron is predicted {abs(apart):.0%} {word} than their bar"
