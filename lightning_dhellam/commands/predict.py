"""`dhellam predict`: what a step of a recipe takes on a cluster, or what its model predicts."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dhellam.commands.numbers import amount
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.commands.planned import add_planned, check_config, run_of
from lightning_dhellam.files import check_file, save_text
from lightning_dhellam.parallel.topology import LANES
from lightning_dhellam.plan import Lane

if TYPE_CHECKING:
    from lightning_dhellam.memory import Run
    from lightning_dhellam.module import DualStrandMixin
    from lightning_dhellam.parallel import Cluster

_USAGE = (
    "dhellam predict --config FILE_OR_RECIPE --cluster NAME_OR_FILE [options] [overrides as for"
    " `dhellam fit`]"
)
CLUSTER = "--cluster"


def predict_command(words: list[str]) -> int:
    """Say what a step takes, where a cluster is named; otherwise run Lightning's `predict`.

    Returns the exit code.
    """
    if any(word.partition("=")[0] == CLUSTER for word in words):
        return step_command(words[1:])
    if words[1:] in (["-h"], ["--help"]):
        step_parser().print_help()
        print(f"\nWithout {CLUSTER} it is LightningCLI's: `dhellam fit --help` lists its options.")
        return 0
    from lightning_dhellam.commands.fit import loop_command

    return loop_command(words)


def step_command(argv: Sequence[str]) -> int:
    """Predict a training step of a recipe on a cluster, whose GPUs need not be there.

    Every lane, both strands under the plan, the pipeline's schedule, recomputation, reduction of
    gradients and optimizer: time, tokens per second, MFU, what is exposed, and memory, with bars.
    Operators are as long as in the profile of one rank, and derived from data sheets where there is
    none.
    """
    from lightning_dhellam.advice import Conditions, check_run, memory_of, predict
    from lightning_dhellam.commands.fit import configuration
    from lightning_dhellam.parallel import Cluster
    from lightning_dhellam.search.measure import Profile
    from lightning_dhellam.search.report.prediction_text import prediction_text
    from lightning_dhellam.search.solve import Budget

    options, words = step_parser().parse_known_args(list(argv))
    check_config(words, "predict")
    for name in ("json", "report", "trace"):
        if getattr(options, name) is not None:
            check_file(getattr(options, name), f"--{name} {getattr(options, name)}")
    if options.measure and options.profile is None:
        raise ValueError("--measure needs --profile FILE, where what it measures is kept")
    cluster = Cluster.load(options.cluster, "--cluster ")
    slower = dict(options.slower or ())
    Conditions(cluster)  # refuses it before a recipe is read, which takes seconds
    read = configuration(words)
    run = plain(run_of(read, options)[0], read["model"])
    check_run(run, cluster)
    if options.measure:
        _measure(run, cluster, options.profile)
    profile = None if options.profile is None else Profile.load(options.profile)
    conditions = Conditions(cluster, profile, named(read["model"]), options.straggler, slower)
    budget = Budget() if options.search else None
    found = predict(run, conditions, memory=memory_of(run), search=budget)
    print(prediction_text(found))
    if options.json is not None:
        save_text(options.json, json.dumps(found.as_values(), indent=1) + "\n")
        print(f"written to {options.json}")
    if options.report is not None:
        from lightning_dhellam.search.report.page import prediction_page, save_page

        save_page(options.report, prediction_page(found))
        print(f"written to {options.report}")
    if options.trace is not None:
        from lightning_dhellam.search.report.trace import save_predicted_trace

        save_predicted_trace(options.trace, found)
        print(f"written to {options.trace}")
    return 0


def step_parser() -> Parser:
    """What `dhellam predict` with a cluster takes beside a recipe."""
    # argparse, since jsonargparse cannot leave the words that are meant for LightningCLI.
    parser = Parser(prog="dhellam predict", usage=_USAGE, description=step_command.__doc__)
    parser.add_argument(CLUSTER, required=True, help="a name of `dhellam clusters`, or a file")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="of one rank, such as `dhellam search` saves"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="on the device at hand, one layer of one rank, unless the file of --profile is there",
    )
    parser.add_argument(
        "--straggler",
        type=amount,
        default=1.0,
        metavar="TIMES",
        help="that one rank computes slower than the others",
    )
    parser.add_argument(
        "--slower",
        type=_slower,
        nargs="+",
        metavar="LANE=TIMES",
        help="lanes whose network is slower, such as dp=2",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="a plan for a recipe of `plan: auto`, which takes up to a minute, in place of the"
        " fastest built-in one",
    )
    add_planned(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of all that is predicted")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="page of it for a browser, .html"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="its timelines for Perfetto (ui.perfetto.dev)"
    )
    return parser


def _measure(run: Run, cluster: Cluster, path: Path) -> None:
    """Take the profile of a rank's shard here, and keep it in a file, unless that is there."""
    import torch

    from lightning_dhellam.bench.shard import shard_profile

    if path.exists():
        return
    check_file(path, f"--profile {path}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shard_profile(run, cluster, device).save(path)
    print(f"measured one layer on {device}: written to {path}")


def _slower(text: str) -> tuple[Lane, float]:
    lane, _, times = text.partition("=")
    known = [str(one) for one in (*LANES, Lane.OFFLOAD, Lane.FETCH)]
    if lane not in known:
        raise ArgumentTypeError(f"'{text}' must be LANE=TIMES with a lane of {', '.join(known)}")
    return Lane(lane), amount(times)


def named(module: DualStrandMixin) -> str:
    """What a module's model is called."""
    preset = module.hparams.get("preset")
    return str(preset) if preset else type(module).__name__


def plain(run: Run, module: DualStrandMixin) -> Run:
    """The same run; its model is made of its configuration alone, if nothing else makes it."""
    from lightning_dhellam.module import DualStrandMixin

    kind = type(module)
    own = kind.build_model is not DualStrandMixin.build_model
    if own or kind.planned_model is not DualStrandMixin.planned_model or module.lora is not None:
        return run
    return replace(run, build=None)
