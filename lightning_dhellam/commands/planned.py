"""The run that words of a command line configure, before there is one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_dhellam.commands.numbers import positive
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.recipes import OPTIONS

if TYPE_CHECKING:
    from lightning_dhellam.memory import Run
    from lightning_dhellam.strategy import DHellamStrategy

UNSAID = ("ranks", "batch_size", "sequence_length")
"""Options that say what a recipe may not."""
_FREE = ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io")
"""Arguments of the strategy that say nothing of what is planned."""
_SHORT = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}
"""Lightning's other names of precisions."""


def add_planned(parser: Parser) -> None:
    """Add what a recipe may not say: `--ranks`, `--batch_size` and `--sequence_length`."""
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="where devices are not a number"
    )
    parser.add_argument(
        "--batch_size", type=positive, help="samples of a rank's batch, if data do not say"
    )
    parser.add_argument("--sequence_length", type=positive, help="if data do not say")


def check_config(words: list[str], command: str) -> None:
    """Refuse words that name no recipe."""
    if not any(word.partition("=")[0] in OPTIONS for word in words):
        raise ValueError(
            f"{command} needs --config FILE, or the name of a recipe: see dhellam recipes"
        )


def run_of(read: Mapping[str, Any], options: Any) -> tuple[Run, DHellamStrategy]:
    """The run that was configured, and its strategy.

    Args:
        read: what `fit.configuration` has read.
        options: with those of `add_planned`.
    """
    from lightning_dhellam.commands.optimizer import configured
    from lightning_dhellam.parallel.topology import Topology
    from lightning_dhellam.pipeline.schedules import placement_of
    from lightning_dhellam.strategy.checks import check_module
    from lightning_dhellam.strategy.planning import planned_run

    trainer = read["trainer"]
    strategy = _strategy(trainer.get("strategy"))
    topology = Topology(
        world_size=_world_size(trainer, strategy, options.ranks),
        tp_size=strategy.tensor_parallel_size,
        pp_size=strategy.pipeline_parallel_size,
        cp_size=strategy.context_parallel_size,
        ep_size=strategy.expert_parallel_size,
        etp_size=strategy.expert_tensor_parallel_size,  # type: ignore[arg-type]
    )
    placement = placement_of(strategy.schedule, topology.pp_size)
    check_module(read["model"], topology, placement, strategy.pipeline_split)
    precision = str(trainer.get("precision"))
    precision = _SHORT.get(precision, precision)
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision} must be one of {', '.join(PRECISIONS)}")
    given = (read.get("data") or {}).get("init_args") or {}
    samples, length = (_of_data(name, options, given) for name in ("batch_size", "sequence_length"))
    run = planned_run(
        strategy,
        read["model"],
        topology,
        precision=precision,
        samples=samples,
        length=length,
        memory_limit=strategy.memory_limit,
        optimizer=configured(read),
    )
    return run, strategy


def _of_data(name: str, options: Any, given: Mapping[str, Any]) -> int:
    size = getattr(options, name) or given.get(name)
    if size is None:
        raise ValueError(f"data does not say {name}: give --{name}")
    return int(size)


def _strategy(given: Any) -> DHellamStrategy:
    from lightning_dhellam.strategy import DHellamStrategy

    if given in ("dhellam", None, "auto"):
        return DHellamStrategy()
    path = given.get("class_path", "") if isinstance(given, Mapping) else str(given)
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name) if module else None
    if not (isinstance(kind, type) and issubclass(kind, DHellamStrategy)):
        raise ValueError(f"trainer.strategy={path} is none of two strands: use DHellamStrategy")
    arguments = given.get("init_args") or {}
    return kind(**{name: value for name, value in arguments.items() if name not in _FREE})


def _world_size(trainer: Mapping[str, Any], strategy: DHellamStrategy, ranks: int | None) -> int:
    if ranks is not None:
        return ranks
    if strategy.cluster is not None:
        return strategy.cluster.world_size
    devices = trainer.get("devices")
    if isinstance(devices, list):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices={devices} does not say how many ranks: give --ranks N")
    return devices * int(trainer.get("num_nodes") or 1)
