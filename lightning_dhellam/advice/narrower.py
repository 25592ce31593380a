"""What gathers in 8 bits would bring a run that is predicted: offered, as by a search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lightning_dhellam.advice.priceable import Conditions, Priceable
from lightning_dhellam.layers.narrower import NARROWER, narrower
from lightning_dhellam.memory import Run
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.file import named_plan
from lightning_dhellam.search.cluster import Prediction
from lightning_dhellam.search.report import Offer


def offers(run: Run, conditions: Conditions, found: Prediction) -> Iterator[Offer]:
    """Predict what each such option would bring that a run has not, where enough is exposed.

    Both sides have the run's plan, or the fastest built-in one where it is searched, and few layers
    of many that are alike.

    Args:
        run: that was predicted.
        conditions: cluster and profile.
        found: its prediction.

    Raises:
        ValueError: as for a prediction.
    """
    topology = run.topology
    run = replace(run, schedule=run.begun)
    builders = BUILDERS if run.plan == "auto" else {run.plan: named_plan(run.plan)}

    def seconds(one: Run) -> float:
        priceable = Priceable.of(one, conditions, conditions.known())
        return priceable.play(builders, sketch=True).seconds

    for name in narrower(
        topology,
        run.config.windows,
        fp8=run.fp8,
        fp8_all_gather=run.fp8_all_gather,
        context_fp8_keys=run.context_fp8_keys,
    ):
        option = NARROWER[name]
        use = found.lanes.get(str(option.lane))
        if use is None or not option.is_worth_asking(use.exposed / found.seconds):
            continue
        taken: dict[str, Any] = {name: True}
        with_it = seconds(replace(run, **taken))
        yield Offer(f"{name}=True", with_it, seconds(run), option.changes(run.fp8))
