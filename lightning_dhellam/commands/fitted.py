"""A run of `dhellam fit`, as it lies in the folder of its logs, beside what is predicted of it."""

from __future__ import annotations

import csv
import statistics
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_dhellam.advice import Conditions
    from lightning_dhellam.bench.several.predicted import Beside

_CONFIG, _METRICS, _RATE = "config.yaml", "metrics.csv", "tokens_per_second"


def fitted(folder: Path, conditions: Conditions, options: Namespace) -> Beside:
    """Predict the steps of a run, and tell how long they took: the median of its later half.

    The earlier half, in which plans are searched and buffers made, does not count.

    Args:
        folder: of its logs, with what it was configured by and what it has logged.
        conditions: cluster and profile.
        options: with those of `add_planned`, which say what the run's configuration does not.

    Raises:
        ValueError: the folder lacks one of them, or the run cannot be predicted.
    """
    from lightning_dhellam.advice import check_run, predict
    from lightning_dhellam.bench.several.predicted import Beside
    from lightning_dhellam.commands.fit import configuration
    from lightning_dhellam.commands.planned import run_of
    from lightning_dhellam.commands.predict import plain

    rates = _rates(folder / _METRICS)
    config = folder / _CONFIG
    if not config.is_file():
        raise ValueError(f"{folder} has no {_CONFIG}, which `dhellam fit` writes: give its logs")
    read = configuration(["--config", str(config)])
    run = plain(run_of(read, options)[0], read["model"])
    check_run(run, conditions.cluster)
    found = predict(run, conditions)
    tokens = run.samples * run.length * run.topology.dp_size
    measured = tokens / statistics.median(rates[len(rates) // 2 :])
    name = f"{folder.name}: {found.choice}"
    return Beside(name, measured, found.seconds, found.low, found.high, None, 0.0)


def _rates(path: Path) -> list[float]:
    """Tokens per second, as `ThroughputMonitor` has logged them."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {path.name}: train with --trainer.logger CSVLogger, and give"
            " the folder of its logs"
        )
    with path.open(newline="") as file:
        rates = [float(row[_RATE]) for row in csv.DictReader(file) if row.get(_RATE)]
    if not rates:
        raise ValueError(
            f"{path} has no {_RATE}: train with lightning_dhellam.callbacks.ThroughputMonitor"
            " among trainer.callbacks, for more steps than trainer.log_every_n_steps"
        )
    return rates
