"""`dhellam simulate` and `dhellam plan schedule`."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from lightning_dhellam.plan import BUILDERS, Strand
from lightning_dhellam.search.chunks import layers_of
from lightning_dhellam.search.comparison import Setting, compare, save, table
from lightning_dhellam.search.cost import Costs
from lightning_dhellam.search.passes import UniformCosts
from lightning_dhellam.search.planfile import PlanFile
from lightning_dhellam.search.profile import Profile
from lightning_dhellam.search.schedules import Pass, check, fold
from lightning_dhellam.search.stages import Link, PipelineRun, run
from lightning_dhellam.staging import check_file, check_folder


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
    print(f"\n{table(comparison)}")
    from lightning_dhellam.search.pipeline_pictures import save_pipelines

    titles = {_title(name, one.run): one.run for name, one in comparison.compared.items()}
    save_pipelines(folder / "pipelines.png", titles)
    save(folder / "pipelines.json", comparison, conditions)
    print(f"\nwritten to {folder / 'pipelines.png'} and {folder / 'pipelines.json'}")
    return 0


def _simulate_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="dhellam simulate",
        description="Play a training step on the stages of a pipeline, from measured times of"
        " operators, under 1F1B, interleaved 1F1B, ZB-V, DualPipeV and the fold.",
        epilog="Each pass is carried out in the fastest of the built-in orders, whatever the"
        " schedule. Passes of a stage are not overlapped with each other, and transfers between"
        " stages disturb nothing: neither is in a profile. The reduction of gradients and the"
        " optimizer come after, and are left out.",
    )
    _add_sizes(parser)
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--layers",
        type=_positive,
        help="of the model, without embedding and head; by default what the profile says",
    )
    parser.add_argument(
        "--tokens", type=_positive, help="of a micro-batch; by default what the profile says"
    )
    parser.add_argument(
        "--p2p-bandwidth",
        type=_amount,
        default=50.0,
        metavar="GB/s",
        help="that a stage sends with (default 50: a link of 400 Gbit/s)",
    )
    parser.add_argument(
        "--p2p-latency", type=_not_negative, default=10.0, metavar="us", help="default 10"
    )
    parser.add_argument(
        "--virtual",
        type=_positive,
        default=2,
        metavar="N",
        help="chunks of a stage in interleaved 1F1B (default 2)",
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
        Link(options.p2p_bandwidth * 1e9, options.p2p_latency * 1e-6),
        options.virtual,
        builders,
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
        "between stages": f"{options.p2p_bandwidth:g} GB/s, {options.p2p_latency:g} µs",
    }


def _title(name: str, played: PipelineRun) -> str:
    shares = played.share("bubble")
    return f"{name} · bubble {sum(shares) / len(shares):.1%}"


def schedule_command(argv: Sequence[str]) -> int:
    """Print the fold as a table, and draw it."""
    parser = ArgumentParser(
        prog="dhellam plan schedule",
        description="Print the passes of every stage of the folded pipeline.",
    )
    _add_sizes(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to draw: a PNG file")
    options = parser.parse_args(argv)
    if options.output is not None:
        check_file(options.output, f"--output {options.output}")
    schedule = fold(options.stages, options.micro_batches)
    check(schedule)
    print(fold_table(options.stages, options.micro_batches))
    if options.output is not None:
        from lightning_dhellam.search.pipeline_pictures import save_pipelines

        played = run(schedule, UniformCosts(both=3.0))
        save_pipelines(options.output, {_title("fold", played): played}, unit="of one forward")
        print(f"written to {options.output}")
    return 0


def fold_table(stages: int, micro_batches: int) -> str:
    """The passes of every stage, below each other where they run at the same time.

    All passes are taken to last equally long.
    """
    played = run(fold(stages, micro_batches), UniformCosts(input=0.5, weight=0.5, both=1.0))
    rows = []
    for stage, use in enumerate(played.stages):
        row = [""] * round(played.seconds)
        for span in use.spans:
            row[round(span.start)] = _cell(stage, span.works)
        rows.append(row)
    width = max(len(cell) for row in rows for cell in row)
    lines = [
        f"fold: {stages} stages, {micro_batches} micro-batches of forward F and backward B",
        "↓ the first chunk of the stage forward, the second backward; ↑ the other way round",
    ]
    for stage, row in enumerate(rows):
        label = f"stage {stage}, chunks {stage} and {2 * stages - 1 - stage}"
        cells = (cell.ljust(width) for cell in row)
        lines.append(f"{label:<24}  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _cell(stage: int, works: Pass) -> str:
    down = all((work.chunk == stage) == (work.strand is Strand.FORWARD) for work in works)
    return ("↓" if down else "↑") + " ".join(f"{work.part}{work.micro_batch}" for work in works)


def _add_sizes(parser: ArgumentParser) -> None:
    parser.add_argument("--stages", type=_positive, required=True, metavar="P")
    parser.add_argument("--micro-batches", type=_positive, required=True, metavar="M")


def _positive(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 1, "a whole number of at least 1"))


def _amount(text: str) -> float:
    return _number(text, float, lambda value: value > 0, "a number above 0")


def _not_negative(text: str) -> float:
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def _number(
    text: str, kind: Callable[[str], float], allowed: Callable[[float], bool], rule: str
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and allowed(value)):
        raise ArgumentTypeError(f"'{text}' must be {rule}")
    return value
