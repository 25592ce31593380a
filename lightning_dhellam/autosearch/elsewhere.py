"""Schedules whose chunks lie on other stages than a run's: what they would bring is said."""

from __future__ import annotations

from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.pipeline.schedules import playable
from lightning_dhellam.plan import Builder
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import Link, Links, Setting, compare, layers_of


def elsewhere(
    runner: Runner,
    profile: Profile,
    builder: Builder,
    links: Links,
    *,
    tokens: int,
    micro_batches: int,
) -> dict[str, str]:
    """Why each schedule was not tried that needs the chunks elsewhere. Every rank must call this.

    Where layers lie is decided when a run starts, so that a search can only tell how fast such a
    schedule would be. The stage of the embedding tells it, if it has the head as well; of models
    whose layers are of several kinds nothing is told.

    Args:
        runner: that trains.
        profile: of the operators of this stage.
        builder: makes the plan of each pair of graphs.
        links: that lead away from this stage, of which the slowest counts.
        tokens: how many tokens a micro-batch has.
        micro_batches: how many micro-batches a step has.
    """
    placement = runner.context.placement
    told: dict[str, str] = {}
    if runner.context.topology.pp_rank == placement.first == placement.last:
        try:
            layers = layers_of(profile, runner.model.config.num_layers)
            link = min(links.values(), key=lambda one: one.bandwidth, default=Link())
            setting = Setting(
                layers,
                Costs.of(profile),
                placement.stages,
                micro_batches,
                tokens,
                link,
                builders={"": builder},
            )
            told = _told(
                {name: one.run.seconds for name, one in compare(setting).compared.items()},
                frozenset(playable(placement)),
            )
        except ValueError:
            pass  # no model of one kind of layers, or too few of them
    return of_all_ranks(told, runner.context.groups.pp)[placement.first]


def _told(seconds: dict[str, float], here: frozenset[str]) -> dict[str, str]:
    """What is told of each schedule that is not one of `here`, compared with the best of those."""
    best = min(here & seconds.keys(), key=seconds.__getitem__)
    told = {}
    for name in seconds.keys() - here:
        ratio = seconds[best] / seconds[name]
        speed = f"{ratio:.2f}× as fast as '{best}', if there is memory for it"
        remedy = f": give schedule='{name}' from the start" if ratio > 1 else ""
        told[name] = f"its chunks lie on other stages; it is predicted to be {speed}{remedy}"
    return dict(sorted(told.items()))
