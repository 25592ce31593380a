"""`dhellam plan memory`: what every rank of a recipe's run will take, before there is one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.commands.planned import add_planned, check_config, run_of
from lightning_dhellam.files import check_file, save_text
from lightning_dhellam.values import memory_bytes

_USAGE = "dhellam plan memory --config FILE_OR_RECIPE [options] [overrides as for `dhellam fit`]"


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
    add_planned(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to draw: a PNG file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of the values, in bytes")
    options, words = parser.parse_known_args(list(argv))
    check_config(words, "plan memory")
    for name in ("output", "json"):
        if getattr(options, name) is not None:
            check_file(getattr(options, name), f"--{name} {getattr(options, name)}")

    from lightning_dhellam.commands.fit import configuration
    from lightning_dhellam.memory import memory_table, predict
    from lightning_dhellam.memory.limit import cheapest_change
    from lightning_dhellam.memory.table import as_values
    from lightning_dhellam.plan.by_layer import AUTO

    run, strategy = run_of(configuration(words), options)
    limit = strategy.memory_limit
    if options.device_memory is not None:
        limit = memory_bytes("--device_memory", options.device_memory)
    run = replace(run, memory_limit=limit)
    found = predict(run)
    if run.recompute == AUTO and limit is None:
        print("recompute=auto is shown with the least that it takes: --device_memory says how much")
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
