"""`dhellam compare`: what was measured beside what is predicted of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dhellam.commands.numbers import positive
from lightning_dhellam.commands.parser import Parser

if TYPE_CHECKING:
    from lightning_dhellam.bench.several.predicted import Beside


def compare_command(argv: Sequence[str]) -> int:
    """Predict the steps that `dhellam bench several` or `fit` has measured, and print both.

    Of a folder of `fit`'s logs it is the run's step, the median of its later half. Of a file of the
    file of the benchmark there is a row for each plan of ours that is built in, or `auto`, which is
    taken for the fastest of those; then how many are as close as they should be: a step within 5%,
    a peak of memory within 3%, and steps of one model in the right order if they differ by more
    than 3%.
    """
    parser = Parser(prog="dhellam compare", description=compare_command.__doc__)
    parser.add_argument(
        "measured",
        type=Path,
        help="JSON file of `dhellam bench several`, or folder of the logs of `dhellam fit`",
    )
    parser.add_argument("--cluster", required=True, help="a name of `dhellam clusters`, or a file")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="of one rank of such a run")
    parser.add_argument(
        "--vocabulary", type=positive, default=32000, help="as it was for the benchmark"
    )
    parser.add_argument("--rehearsal", action="store_true", help="it was one, with --device cpu")
    options = parser.parse_args(argv)

    from lightning_dhellam.advice import Conditions
    from lightning_dhellam.bench.several.predicted import besides, verdict
    from lightning_dhellam.commands.fitted import fitted
    from lightning_dhellam.parallel import Cluster
    from lightning_dhellam.search.measure import Profile

    profile = None if options.profile is None else Profile.load(options.profile)
    conditions = Conditions(Cluster.load(options.cluster, "--cluster "), profile)
    if options.measured.is_dir():
        _show([fitted(options.measured, conditions)])
        return 0
    try:
        report = json.loads(options.measured.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{options.measured} is no file of `dhellam bench several`: {error}"
        ) from error
    if not isinstance(report, dict) or report.get("benchmark") != "several":
        raise ValueError(_none(options.measured))
    try:
        rows = [*besides(report, conditions, options.vocabulary, options.rehearsal)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(_none(options.measured)) from error
    if not rows:
        raise ValueError(
            f"no step of ours with a built-in plan in {options.measured}: measure one, such as"
            " `dhellam bench several` does by default"
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


def _none(path: Path) -> str:
    return f"{path} is no file of `dhellam bench several`: give the JSON that it wrote"
