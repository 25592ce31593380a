"""`dhellam advise`: how a model is best spread over a cluster, and the recipe of that."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dhellam.commands.numbers import not_negative, positive
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.files import check_file, save_text
from lightning_dhellam.nearest import suggestion
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.values import read_yaml

if TYPE_CHECKING:
    from lightning_dhellam.memory import Run
    from lightning_dhellam.search.cluster import Prediction

_RECIPE = Path("advised.yaml")


def advise_command(argv: Sequence[str]) -> int:
    """Search parallel sizes, micro-batch, schedule and recomputation for the shortest step.

    Prints the ten best choices that fit into memory, and why each of the others is behind the
    first, whose recipe it writes for `dhellam fit`. Operators are as long as in the profile of one
    rank as far as it has them, and otherwise scaled from it or derived from data sheets, with wider
    bars. The ten are found with the fastest of the built-in plans, and then ordered by plans that
    are searched for each, for as long as `--search_time` says; the run of the recipe searches its
    own.
    """
    options = _parser().parse_args(argv)
    recipe: Path = options.output
    if recipe.suffix != ".yaml":
        raise ValueError(f"--output {recipe} must end in .yaml: that is how a file is told")
    for name in ("output", "json", "report"):
        if getattr(options, name) is not None:
            check_file(getattr(options, name), f"--{name} {getattr(options, name)}")

    from lightning_dhellam.advice import (
        Adviser,
        Conditions,
        PlanSearch,
        Question,
        check_device,
        offers,
    )
    from lightning_dhellam.models import preset
    from lightning_dhellam.parallel import Cluster
    from lightning_dhellam.search.measure import Profile
    from lightning_dhellam.search.report.prediction_text import advice_text, prediction_text

    _check_schedules(options.schedules or ())
    cluster = Cluster.load(options.cluster, "--cluster ")
    profile = None if options.profile is None else Profile.load(options.profile)
    overrides = _overrides(options.overrides)
    config = preset(options.model, **overrides)
    conditions = Conditions(cluster, profile, options.model)
    assert cluster.networks is not None
    ranks = options.devices or cluster.world_size
    if ranks > cluster.world_size:
        raise ValueError(
            f"--devices {ranks}, but cluster '{cluster.name}' has {cluster.world_size}: give at"
            f" most {cluster.world_size}"
        )
    node = cluster.networks.node
    if ranks > node and ranks % node:
        less = ranks - ranks % node
        more = less + node
        near = f"{less} or {more}" if more <= cluster.world_size else f"{less}"
        given = bool(options.devices)
        raise ValueError(
            f"{f'--devices {ranks}' if given else f'cluster {cluster.name!r} of {ranks} devices'}"
            f" is no whole number of nodes of {node}: give {'' if given else '--devices '}{near}"
        )
    question = Question(
        config,
        ranks,
        node,
        options.global_batch,
        options.sequence_length or min(config.max_sequence_length, 8192),
        options.precision,
        tuple(options.schedules or ()),
        fp8=(None, *(options.fp8 or ())),
    )
    for fp8 in options.fp8 or ():
        check_device(fp8, conditions.device, f"--fp8 {fp8}")
    plans = PlanSearch(options.search_time)
    adviser = Adviser(question, conditions, progress=_progress, plans=plans)
    advice = adviser.advise()
    print(advice_text(advice))
    whole = adviser.whole(advice.best)
    run = adviser.run_of(advice.best)
    offered = map(str, offers(run, conditions, whole))
    whole = replace(whole, notes=(*whole.notes, *offered))
    print(f"\n{prediction_text(whole)}")
    save_text(recipe, recipe_of(run, options, overrides, node, advice.best))
    print(f"\nwritten to {recipe}: dhellam fit --config {recipe} --data.path FOLDER")
    if options.json is not None:
        save_text(options.json, json.dumps(advice.as_values(), indent=1) + "\n")
        print(f"written to {options.json}")
    if options.report is not None:
        from lightning_dhellam.search.report.page import advice_page, save_page

        save_page(options.report, advice_page(advice, whole))
        print(f"written to {options.report}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="dhellam advise", description=advise_command.__doc__)
    parser.add_argument("--model", required=True, metavar="PRESET", help="such as llama-3.1-70b")
    parser.add_argument(
        "--overrides", default="{}", metavar="YAML", help="fields of the model, as in a recipe"
    )
    parser.add_argument("--cluster", required=True, help="a name of `dhellam clusters`, or a file")
    parser.add_argument(
        "--global-batch",
        "--global_batch",
        dest="global_batch",
        type=positive,
        required=True,
        metavar="N",
        help="samples of a step, of all ranks together",
    )
    parser.add_argument(
        "--sequence_length", type=positive, help="of samples; by default the model's, up to 8192"
    )
    parser.add_argument("--devices", type=positive, metavar="N", help="of the cluster; all if left")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="of one rank, such as `dhellam search` saves"
    )
    parser.add_argument("--precision", choices=[*PRECISIONS], default="bf16-mixed")
    parser.add_argument("--output", type=Path, default=_RECIPE, metavar="FILE", help="the recipe")
    parser.add_argument(
        "--schedules",
        nargs="+",
        metavar="NAME",
        help="of pipelines, to choose from; by default all that are trained",
    )
    parser.add_argument(
        "--fp8",
        nargs="+",
        metavar="FORMAT",
        help="that linear layers may compute in as well: current, blockwise",
    )
    parser.add_argument(
        "--search_time",
        type=not_negative,
        default=60.0,
        metavar="SECONDS",
        help="in which plans of the ten are searched; 0 for the built-in ones alone",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of all that was found")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="page of it for a browser, .html"
    )
    return parser


def is_cpu(device: str) -> bool:
    """Whether a device of this name is none that Lightning calls a GPU."""
    return device == "CPU" or device.endswith(" threads")


def recipe_of(
    run: Run, options: Any, overrides: dict[str, Any], node: int, best: Prediction
) -> str:
    """The recipe of a run, for `dhellam fit`."""
    import yaml

    topology = run.topology
    devices = min(node, topology.world_size)
    strategy = {
        "tensor_parallel_size": topology.tp_size,
        "pipeline_parallel_size": topology.pp_size,
        "context_parallel_size": topology.cp_size,
        "expert_parallel_size": topology.ep_size,
        **(
            {"expert_tensor_parallel_size": topology.etp_size}
            if topology.etp_size != topology.tp_size
            else {}
        ),
        "micro_batch_size": run.micro_batch_size,
        **({"schedule": run.schedule} if topology.pp_size > 1 else {}),
        "recompute": run.recompute,
        "plan": run.plan,
        **({"fp8": run.fp8} if run.fp8 else {}),
    }
    tree = {
        "seed_everything": 1234,
        "trainer": {
            "accelerator": "cpu" if is_cpu(best.device) else "gpu",
            "devices": devices,
            "num_nodes": topology.world_size // devices,
            "precision": run.precision,
            "max_steps": 1000,
            "gradient_clip_val": 1.0,
            "strategy": {
                "class_path": "lightning_dhellam.DHellamStrategy",
                "init_args": strategy,
            },
            "callbacks": [
                {"class_path": f"lightning_dhellam.callbacks.{name}"}
                for name in ("ThroughputMonitor", "RunSummary")
            ],
        },
        "model": {
            "class_path": "lightning_dhellam.LanguageModel",
            "init_args": {
                "preset": options.model,
                **({"overrides": overrides} if overrides else {}),
            },
        },
        "data": {
            "class_path": "lightning_dhellam.data.IndexedDataModule",
            "init_args": {
                "path": "data/corpus",
                "sequence_length": run.length,
                "batch_size": run.samples,
            },
        },
    }
    head = (
        f"# {options.model} on {topology.world_size} devices of {best.cluster}, as `dhellam advise`"
        f" has found: {best.seconds:.3g} s a step predicted.\n"
    )
    return head + yaml.safe_dump(tree, sort_keys=False)


def _check_schedules(names: Sequence[str]) -> None:
    from lightning_dhellam.pipeline.schedules import AUTO, SCHEDULES, named

    for name in names:
        if name != AUTO and named(name) is None:
            known = (*SCHEDULES, AUTO)
            raise ValueError(
                f"--schedules {name} is not a known schedule: use {' or '.join(known)}"
                f"{suggestion(name, known)}"
            )


def _overrides(text: str) -> dict[str, Any]:
    found = read_yaml(text)
    if not isinstance(found, dict):
        raise ValueError(f"--overrides {text} must be a mapping, such as '{{num_layers: 8}}'")
    return found


def _progress(done: int, count: int) -> None:
    if sys.stderr.isatty() and not done % 10:
        print(f"\r{done} of at most {count} choices played", end="\r", file=sys.stderr)
