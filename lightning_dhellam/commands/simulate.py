"""`dhellam simulate`: pipeline schedules on measured times."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_dhellam.commands.numbers import (
    add_sizes,
    amount,
    counted,
    not_negative,
    positive,
    share,
)
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.files import check_folder
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import (
    Effort,
    Link,
    PipelineRun,
    Setting,
    compare,
    layers_of,
)
from lightning_dhellam.search.report import comparison_table, save_comparison


def simulate_command(argv: Sequence[str]) -> int:
    """Play a step under every pipeline schedule. Prints a table, writes a picture and JSON."""
    options = _simulate_parser().parse_args(argv)
    folder: Path = options.output
    check_folder(folder, f"--output {folder}")
    profile = Profile.load(options.profile)
    setting = _setting(options, profile)
    comparison = compare(setting)
    conditions = _conditions(options, profile, setting)
    print("\n".join(f"{name:<14} {value}" for name, value in conditions.items()))
    print(f"\n{comparison_table(comparison)}")
    from lightning_dhellam.search.report.pipeline_pictures import save_pipelines

    titles = {title(name, one.run): one.run for name, one in comparison.compared.items()}
    save_pipelines(folder / "pipelines.png", titles)
    save_comparison(folder / "pipelines.json", comparison, conditions)
    print(f"\nwritten to {folder / 'pipelines.png'} and {folder / 'pipelines.json'}")
    return 0


def _simulate_parser() -> Parser:
    parser = Parser(
        prog="dhellam simulate",
        description="Play a training step on the stages of a pipeline, from measured times of"
        " operators, under 1f1b, interleaved-1f1b, zb-v, dualpipe-v, the fold and a schedule"
        " searched for these times. Says which is best within the memory, and why not the others.",
        epilog="Each visit is carried out in the fastest of the built-in orders, whatever the"
        " schedule. Visits of a stage are not overlapped with each other. The reduction of"
        " gradients and the optimizer come after, and are left out.",
    )
    add_sizes(parser)
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--layers",
        type=positive,
        help="of the model, without embedding and head; by default what the profile says",
    )
    parser.add_argument(
        "--tokens", type=positive, help="of a micro-batch; by default what the profile says"
    )
    parser.add_argument(
        "--p2p_bandwidth",
        type=amount,
        default=50.0,
        metavar="GB/s",
        help="that a stage sends with (default 50: a link of 400 Gbit/s)",
    )
    parser.add_argument(
        "--p2p_latency", type=not_negative, default=10.0, metavar="us", help="default 10"
    )
    parser.add_argument(
        "--p2p_takes",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="of compute that a transfer takes, of NCCL the share of multiprocessors that its"
        " kernels have (default 0: copy engines)",
    )
    parser.add_argument(
        "--memory",
        type=amount,
        metavar="GiB",
        help="that a stage has for saved activations; by default as much as is needed",
    )
    parser.add_argument(
        "--search",
        type=counted,
        default=Effort.moves,
        metavar="N",
        help="moves by which a schedule is searched, 0 to search none (default %(default)s)",
    )
    parser.add_argument(
        "--virtual",
        type=positive,
        default=2,
        metavar="N",
        help="chunks of a stage in interleaved-1f1b (default 2)",
    )
    parser.add_argument(
        "--plans", type=Path, metavar="FILE", help="plan file whose orders are offered as well"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/simulate"),
        metavar="DIR",
        help="default %(default)s",
    )
    return parser


def _setting(options: Namespace, profile: Profile) -> Setting:
    shapes = profile.fingerprint.shapes
    tokens = options.tokens or shapes.get("micro_batch_size", 0) * shapes.get("sequence_length", 0)
    if not tokens:
        raise ValueError(
            f"{options.profile} does not say how many tokens a micro-batch has: give --tokens"
        )
    count = options.layers or shapes.get("num_layers")
    if not count:
        raise ValueError(f"{options.profile} does not say how many layers there are: give --layers")
    builders = dict(BUILDERS)
    if options.plans:
        builders[options.plans.name] = PlanFile.load(options.plans).builder()
    return Setting(
        layers_of(profile, count),
        Costs.of(profile),
        options.stages,
        options.micro_batches,
        tokens,
        Link(options.p2p_bandwidth * 1e9, options.p2p_latency * 1e-6, options.p2p_takes),
        options.virtual,
        builders,
        options.memory and options.memory * 2**30,
        Effort(moves=options.search) if options.search else None,
    )


def _conditions(options: Namespace, profile: Profile, setting: Setting) -> dict[str, Any]:
    names: dict[str, int] = {}
    for layer in setting.layers:
        names[layer.name] = names.get(layer.name, 0) + 1
    sizes = ", ".join(f"{name} {size}" for name, size in profile.fingerprint.sizes.items())
    return {
        "profile": f"{options.profile}: {profile.fingerprint.device}, {sizes}",
        "layers": ", ".join(f"{count} {name}" for name, count in names.items()),
        "stages": setting.stages,
        "micro-batches": f"{setting.micro_batches} of {setting.tokens:,} tokens",
        "between stages": f"{options.p2p_bandwidth:g} GB/s, {options.p2p_latency:g} µs"
        + f", {options.p2p_takes:.1%} of compute" * bool(options.p2p_takes),
        "memory": f"{options.memory:g} GiB a stage" if options.memory else "as needed",
    }


def title(name: str, played: PipelineRun) -> str:
    shares = played.share("bubble")
    return f"{name} · bubble {sum(shares) / len(shares):.1%}"
