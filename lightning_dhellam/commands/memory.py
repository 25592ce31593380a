"""`dhellam plan memory`: what every rank of a recipe's run will take, before there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dhellam.commands.numbers import positive
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.files import check_file, save_text
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.recipes import OPTIONS
from lightning_dhellam.values import memory_bytes

if TYPE_CHECKING:
    from lightning_dhellam.memory import Run
    from lightning_dhellam.strategy import DHellamStrategy

_USAGE = "dhellam plan memory --config FILE_OR_RECIPE [options] [overrides as for `dhellam fit`]"
_FREE = ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io")
"""Arguments of the strategy that say nothing of memory."""
_SHORT = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed"}
"""Lightning's other names of precisions."""


def memory_command(argv: Sequence[str]) -> int:
    """Predict the memory of every rank of a run: weights, gradients, optimizer, activations.

    Needs no GPU and starts no process. Prints a table with a row for each pipeline stage, whose
    ranks are alike.
    """
    parser = Parser(prog="dhellam plan memory", usage=_USAGE, description=memory_command.__doc__)
    parser.add_argument(
        "--device_memory",
        metavar="SIZE",
        help="of each GPU, such as 80GiB: says what fits, and what would; memory_limit otherwise",
    )
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="where devices are not a number"
    )
    parser.add_argument(
        "--batch_size", type=positive, help="samples of a rank's batch, if data do not say"
    )
    parser.add_argument("--sequence_length", type=positive, help="if data do not say")
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to draw: a PNG file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of the values, in bytes")
    options, words = parser.parse_known_args(list(argv))
    if not any(word.partition("=")[0] in OPTIONS for word in words):
        raise ValueError(
            "plan memory needs --config FILE, or the name of a recipe: see dhellam recipes"
        )
    for name in ("output", "json"):
        if getattr(options, name) is not None:
            check_file(getattr(options, name), f"--{name} {getattr(options, name)}")

    from lightning_dhellam.commands.fit import configuration
    from lightning_dhellam.memory import memory_table, predict
    from lightning_dhellam.memory.limit import cheapest_change
    from lightning_dhellam.memory.table import as_values

    run, limit = _run(configuration(words), options)
    found = predict(run)
    print(memory_table(found, limit))
    if limit is not None and any(rank.total > limit for rank in found):
        change = cheapest_change(run, limit)
        print(f"{change} would fit" if change else "nothing on as many ranks would fit")
    if options.output is not None:
        from lightning_dhellam.search.report.memory_pictures import save_memory

        save_memory(options.output, [rank.parts for rank in found], limit)
        print(f"written to {options.output}")
    if options.json is not None:
        save_text(options.json, json.dumps(as_values(found, limit), indent=1) + "\n")
        print(f"written to {options.json}")
    return 0


def _run(read: Mapping[str, Any], options: Any) -> tuple[Run, int | None]:
    """The run that was configured, and the bytes that a rank may take."""
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
    )
    if options.device_memory is not None:
        return run, memory_bytes("--device_memory", options.device_memory)
    return run, strategy.memory_limit


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
