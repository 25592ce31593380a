"""What would make steps faster, read off what was found: a sentence each, the largest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_dhellam.plan import Lane
from lightning_dhellam.search.cluster import Prediction
from lightning_dhellam.search.model import Simulation
from lightning_dhellam.search.report.outcomes import Outcome, time_text
from lightning_dhellam.search.solve import Solution

_LEAST = 0.02
"""Share of a step below which nothing is said."""
_OFF = 0.05
_IDLE = 0.1

_LESS = "name fewer slots in offload, or have some made again by recompute"

_REMEDIES = {
    Lane.TP: "lower tensor_parallel_size, or make micro_batch_size larger",
    Lane.CP: "lower context_parallel_size, or let context_exchange='auto' choose",
    Lane.EP: "lower expert_parallel_size, or make micro_batch_size larger",
    Lane.PP: "have more micro-batches in a step, or let schedule='auto' choose",
    Lane.DP: "have more micro-batches in a step, or another bucket_size",
    Lane.OFFLOAD: _LESS,
    Lane.FETCH: _LESS,
    Lane.HOST: "make micro_batch_size larger, so that the host waits less often",
}
_NOTHING = "Nothing that was measured here stands out: compute is what the step takes."


def of_search(
    won: Outcome, outcomes: Sequence[Outcome], step: Simulation, main: Solution
) -> list[str]:
    """What to change after a search, from its winner's outcome and simulated step."""
    found = _exposed(won.exposed, won.predicted)
    compute = step.utilisation.get(Lane.COMPUTE, 0.0)
    idle = 1 - compute - sum(won.exposed.values()) / won.predicted
    if idle > _IDLE:
        found.append(
            f"Compute idles in {idle:.0%} of the step where nothing communicates: operators wait"
            " for each other; more micro-batches in a step put more of both strands side by side."
        )
    if main.bound and not main.proven and main.gap > _LEAST:
        found.append(
            f"The searched plan is {main.gap:.1%} above what no order can beat, which"
            f" {main.resource} sets: of that, another order could win at most so much."
        )
    off = [o for o in outcomes if o.error is not None and abs(o.error) > _OFF]
    if off:
        worst = max(off, key=lambda o: abs(o.error or 0.0))
        found.append(
            f"Predictions are off by up to {worst.error:+.0%} ('{worst.name}'): measured steps"
            " decide, and a fresh profile on a device that nothing else uses may be nearer."
        )
    rivals = sorted((o for o in outcomes if o.measured is not None), key=lambda o: o.time)
    if len(rivals) > 1 and rivals[1].time - rivals[0].time <= rivals[0].spread + rivals[1].spread:
        found.append(
            f"'{rivals[0].name}' and '{rivals[1].name}' are within the noise of each other: more"
            " rounds of AutoSearch tell them apart."
        )
    return found or [_NOTHING]


def of_prediction(step: Prediction) -> list[str]:
    """What to change in how a model is spread over a cluster."""
    found = []
    if not step.fits:
        found.append(
            f"The step needs {step.bytes / 2**30:.1f} GiB of {step.memory_limit / 2**30:.1f} GiB:"
            " let backward make more again (recompute), or split the model over more ranks."
        )
    if step.bubble > _LEAST:
        found.append(
            f"Stages have nothing to do in {step.bubble:.1%} of the step: have more micro-batches"
            f" than {step.choice.micro_batches}, fewer stages than {step.choice.pp}, or another"
            f" schedule than {step.choice.schedule}."
        )
    lanes = {Lane(name): use.exposed for name, use in step.lanes.items() if name != Lane.COMPUTE}
    found += _exposed(lanes, step.seconds)
    count = len(step.stages)
    optimizer = sum(stage.optimizer for stage in step.stages) / count / step.seconds
    if optimizer > _LEAST:
        found.append(
            f"The optimizer takes {optimizer:.1%} of the step: a larger global batch, or more ranks"
            " that share its state, make that less."
        )
    guessed = {name: s for name, s in step.origins.items() if name in ("derived", "scaled")}
    share = sum(guessed.values()) / (sum(step.origins.values()) or 1.0)
    if share > _LEAST:
        found.append(
            f"{share:.0%} of the operators' time is not measured but {' or '.join(guessed)}:"
            " profile these sizes for a narrower range."
        )
    return found or [_NOTHING]


def _exposed(lanes: Mapping[Lane, float], step: float) -> list[str]:
    found = sorted(lanes.items(), key=lambda item: -item[1])
    return [
        f"{lane}: {time_text(seconds)} of the step ({seconds / step:.1%}) are exposed, and hiding"
        f" all of it would make steps {step / (step - seconds):.2f}× as fast: {_REMEDIES[lane]}."
        for lane, seconds in found
        if _LEAST * step < seconds < step
    ]
