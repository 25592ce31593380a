"""`dhellam compare`: what was measured beside what is predicted of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dhellam.commands.numbers import positive
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.commands.planned import UNSAID, add_planned

if TYPE_CHECKING:
    from lightning_dhellam.bench.several.predicted import Beside


def compare_command(argv: Sequence[str]) -> int:
    """Predict the steps that `dhellam bench several` or `fit` has measured, and print both.

    Of a folder of `fit`'s logs it is the run's step, the median of its later half; --ranks,
    --batch_size and --sequence_length say what its configuration leaves open. Of files of
    the benchmark there is a row for each plan of ours that is built in, or `auto`, which is
    taken for the fastest of those; then how many are as close as they should be: a step within 5%,
    a peak of memory within 3%, and steps of one model in the right order if they differ by more
    than 3%. Operators are as long as in the profile that the benchmark has kept of each case, if it
    is beside the file.
    """
    parser = Parser(prog="dhellam compare", description=compare_command.__doc__)
    parser.add_argument(
        "measured",
        type=Path,
        nargs="+",
        help="JSON files of `dhellam bench several`, or folder of the logs of `dhellam fit`",
    )
    parser.add_argument("--cluster", required=True, help="a name of `dhellam clusters`, or a file")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of a rank, in place of those")
    parser.add_argument(
        "--vocabulary", type=positive, default=32000, help="as it was for the benchmark"
    )
    parser.add_argument("--rehearsal", action="store_true", help="it was one, with --device cpu")
    add_planned(parser)
    options = parser.parse_args(argv)

    from lightning_dhellam.advice import Conditions
    from lightning_dhellam.bench.several.predicted import besides, kept_profile, verdict
    from lightning_dhellam.commands.fitted import fitted
    from lightning_dhellam.parallel import Cluster
    from lightning_dhellam.search.measure import Profile

    cluster = Cluster.load(options.cluster, "--cluster ")
    given = None if options.profile is None else Profile.load(options.profile)
    if len(options.measured) == 1 and options.measured[0].is_dir():
        _show([fitted(options.measured[0], Conditions(cluster, given), options)])
        return 0
    for name in UNSAID:
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} {getattr(options, name)} is for the folder of a run, and"
                f" {options.measured[0]} is a file, which says it: leave --{name} out"
            )

    def conditions(path: Path, case: str) -> Conditions:
        kept = None if given is not None else kept_profile(path, case)
        return Conditions(cluster, given if kept is None else Profile.load(kept))

    rows: list[Beside] = []
    for path in options.measured:
        report, known = _report(path), partial(conditions, path)
        try:
            rows += besides(report, known, options.vocabulary, options.rehearsal)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(_none(path)) from error
    if not rows:
        raise ValueError(
            f"no step of ours with a built-in plan in {', '.join(map(str, options.measured))}:"
            " measure one, such as `dhellam bench several` does by default"
        )
    _show(rows)
    print("\n".join(verdict(rows)))
    return 0


def _show(rows: Sequence[Beside]) -> None:
    width = max(len(row.name) for row in rows)
    for row in rows:
        memory = "-"
        if row.bytes is not None:
            memory = (
                f"{row.bytes / 2**30:.2f} GiB, predicted {row.predicted_bytes / 2**30:.2f}"
                f" ({row.memory_error:+.1%})"
            )
        inside = "" if row.low <= row.measured <= row.high else ", outside of its bars"
        print(
            f"{row.name:<{width}}  {row.measured * 1e3:8.1f} ms, predicted"
            f" {row.predicted * 1e3:8.1f} ({row.error:+.1%}{inside})  {memory}"
        )


def _report(path: Path) -> Any:
    """What a file holds, if it is one of the benchmark."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of `dhellam bench several`: {error}") from error
    if not isinstance(report, dict) or report.get("benchmark") != "several":
        raise ValueError(_none(path))
    return report


def _none(path: Path) -> str:
    return f"{path} is no file of `dhellam bench several`: give the JSON that it wrote"
