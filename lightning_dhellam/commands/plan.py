"""`dhellam plan`: plans of a file, and the schedule of a pipeline, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_dhellam.commands.numbers import add_sizes
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.commands.simulate import title
from lightning_dhellam.files import check_file
from lightning_dhellam.pipeline.schedules import Visit, fold, verify
from lightning_dhellam.plan import Strand
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.pipeline import UniformCosts, play

USAGE = """\
usage: dhellam plan show FILE
       dhellam plan schedule --stages P --micro_batches M [--output FILE]
       dhellam plan memory --config FILE_OR_RECIPE [options]

  show       print the plans of a plan file, such as that of a search
  schedule   print the visits of every stage of the folded pipeline
  memory     predict what every rank of a run takes

`dhellam plan schedule --help` and `dhellam plan memory --help` say more.
"""


def plan_command(words: list[str]) -> int:
    """Print every plan of a plan file as a table, or the schedule of a pipeline."""
    if words[:1] == ["schedule"]:
        return schedule_command(words[1:])
    if words[:1] == ["memory"]:
        from lightning_dhellam.commands.memory import memory_command

        return memory_command(words[1:])
    if words in (["-h"], ["--help"], ["show", "-h"], ["show", "--help"]):
        print(USAGE, end="")
        return 0
    if len(words) != 2 or words[0] != "show":
        raise ValueError(
            f"plan {' '.join(words)}: use 'dhellam plan show FILE', 'dhellam plan schedule"
            " --stages P --micro_batches M' or 'dhellam plan memory --config FILE'"
        )
    print(PlanFile.load(words[1]))
    return 0


def schedule_command(argv: Sequence[str]) -> int:
    """Print the fold as a table, and draw it."""
    parser = Parser(
        prog="dhellam plan schedule",
        description="Print the visits of every stage of the folded pipeline.",
    )
    add_sizes(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to draw: a PNG file")
    options = parser.parse_args(argv)
    if options.output is not None:
        check_file(options.output, f"--output {options.output}")
    schedule = fold(options.stages, options.micro_batches)
    verify(schedule)
    print(fold_table(options.stages, options.micro_batches))
    if options.output is not None:
        from lightning_dhellam.search.report.pipeline_pictures import save_pipelines

        played = play(schedule, UniformCosts(both=3.0))
        save_pipelines(options.output, {title("fold", played): played}, unit="of one forward")
        print(f"written to {options.output}")
    return 0


def fold_table(stages: int, micro_batches: int) -> str:
    """Print the visits of every stage, below each other where they run at the same time.

    All visits are taken to last equally long.
    """
    played = play(fold(stages, micro_batches), UniformCosts(input=0.5, weight=0.5, both=1.0))
    rows = []
    for stage, use in enumerate(played.stages):
        row = [""] * round(played.seconds)
        for visit in use.intervals:
            row[round(visit.start)] = _cell(stage, visit.works)
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


def _cell(stage: int, works: Visit) -> str:
    down = all((work.chunk == stage) == (work.strand is Strand.FORWARD) for work in works)
    return ("↓" if down else "↑") + " ".join(f"{work.part}{work.micro_batch}" for work in works)
