"""`dhellam plan`: plans of a file, and the schedule of a pipeline, as tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_dhellam.commands.numbers import add_sizes
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.commands.simulate import title
from lightning_dhellam.files import check_file
from lightning_dhellam.pipeline.schedules import SCHEDULES, Schedule, Visit, fold, verify
from lightning_dhellam.pipeline.schedules.named import named as named_schedule
from lightning_dhellam.plan import Strand
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.pipeline import UniformCosts, play

USAGE = """\
usage: dhellam plan show FILE
       dhellam plan schedule [NAME] --stages P --micro_batches M [--output FILE]
       dhellam plan memory --config FILE_OR_RECIPE [options]

  show       print the plans of a plan file, such as that of a search
  schedule   print the visits of every stage of the folded pipeline, or of another schedule
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
    """Print a schedule as a table, and draw it."""
    parser = Parser(
        prog="dhellam plan schedule",
        description="Print the visits of every stage of a pipeline: of the fold as a table, or of"
        f" the schedule NAME ({', '.join(SCHEDULES)}, or a file that holds one) as text that is"
        " such a file.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME")
    add_sizes(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="picture to draw: a PNG file")
    options = parser.parse_args(argv)
    if options.output is not None:
        check_file(options.output, f"--output {options.output}")
    schedule = _schedule(options.name or "fold", options.stages, options.micro_batches)
    verify(schedule)
    if options.name is None:
        print(fold_table(options.stages, options.micro_batches))
    else:
        print(schedule)
    if options.output is not None:
        from lightning_dhellam.search.report.pipeline_pictures import save_pipelines

        played = play(schedule, UniformCosts(both=3.0))
        titles = {title(schedule.name, played): played}
        save_pipelines(options.output, titles, unit="of one forward")
        # What is printed of a named schedule is a file of it, and nothing else.
        print(f"written to {options.output}", file=sys.stderr if options.name else sys.stdout)
    return 0


def _schedule(name: str, stages: int, micro_batches: int) -> Schedule:
    """Make a named schedule, or read one that must have these sizes."""
    make = named_schedule(name)
    if make is not None:
        return make(stages, micro_batches)
    if not Path(name).is_file():
        raise ValueError(
            f"schedule '{name}' is neither a file nor one of {', '.join(SCHEDULES)}: give one"
        )
    schedule = Schedule.parse(Path(name).read_text())
    if (schedule.stages, schedule.micro_batches) != (stages, micro_batches):
        raise ValueError(
            f"{name} is of {schedule.stages} stages and {schedule.micro_batches} micro-batches, not"
            f" {stages} and {micro_batches}: give those (--stages, --micro_batches)"
        )
    return schedule


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
