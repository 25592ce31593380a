"""`dhellam bench overlap`: how much communication hides, on one rank of an emulated cluster.

    a   Llama-3-70B width, tensor parallel 8, sequence 8192, micro-batch 1
    b   Qwen3-14B width, tensor parallel 8, sequence 8192, micro-batch 4

The transformer layers alone are trained, without embedding and loss head, so that the time of a
layer is its own: what a step of more micro-batches takes longer, by micro-batch and layer. A link
is a copy engine or some SMs (`parallel.link`); numbers do not come over it, so plans are compared
for equal results in a pass in which every collective brings this rank's own numbers, and attention
adds up in a fixed order.

`compute` is measured with collectives that take no time. The bound is what the busier of compute
and link needs for a layer, each undisturbed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.autosearch.session import MEMORY_SLACK
from lightning_dhellam.bench.cells import SLOWER, Cell, cells, parse_link, shapes
from lightning_dhellam.bench.plans import PLANS
from lightning_dhellam.bench.report import Report, Row, device_name
from lightning_dhellam.bench.stage import Effort, Stage, rank_of
from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.parallel import Cluster, Link

DESCRIPTION = "layer and step times of every plan over emulated links, against the bound"

COLUMNS = (
    "cell", "plan", "layer ms", "over megatron", "of bound", "exposed ms", "step ms", "spread ms",
    "predicted ms", "error", "step error", "peak GiB", "of sequential", "parity", "farthest",
)  # fmt: skip
LINKS = ("copy:110", "16sm:200", "copy:370", "16sm:370", "16sm:100")
"""In the order of their importance."""
_PUBLISHED = "a layer takes 21.9 ms with Megatron, 19.2 with TWIST, 16.5 with nothing exposed"
_PICTURED = ("a4 copy:110", "a4 16sm:200", "b4 copy:calibrated", "b4 16sm:calibrated")


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse in miniature")
    parser.add_argument("--miniature", type=bool, default=False, help="rehearse on a GPU")
    parser.add_argument("--links", type=list[str], default=list(LINKS), help="over which to train")
    parser.add_argument("--cluster", default=None, help="its link instead: a name, or a file")
    parser.add_argument("--plans", type=list[str], default=list(PLANS))
    parser.add_argument("--cells", type=list[str], default=None, help="names of some, such as a4")
    parser.add_argument("--micro_batches", type=list[int], default=[4, 8], help="of two steps")
    parser.add_argument("--rounds", type=int, default=4, help="that count; one more comes before")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each operator that count")
    parser.add_argument(
        "--memory_slack", type=float, default=MEMORY_SLACK, help="share that plans may need more"
    )
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which cells stop")
    parser.add_argument("--levers", type=bool, default=False, help="try what may pay beyond order")


def run(options: Namespace) -> Report:
    """Measure every cell that the budget allows, the most important first."""
    _check(options)
    prepare()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    rehearse = options.miniature or device.type == "cpu"
    few, many = sorted(options.micro_batches)
    effort = Effort(
        tuple(options.plans), few, many, options.rounds, options.repeats, options.memory_slack
    )
    links = _links(options)
    todo = cells(links, calibrate=options.cluster is None, levers=options.levers)
    if options.cells is not None:
        todo = [cell for cell in todo if any(cell.name.startswith(n) for n in options.cells)]
    notes = {
        "EMULATED": "one rank of 8, its links played: times mean something, numbers do not",
        "steps": f"of {few} and {many} micro-batches; a layer is their difference",
    }
    if not rehearse and any(cell.shape == "b" for cell in todo):
        notes["published for b on 8 H200"] = _PUBLISHED
    if options.memory_slack != MEMORY_SLACK:
        notes["memory slack"] = f"{options.memory_slack:g} instead of {MEMORY_SLACK:g}"
    if rehearse:
        notes["REHEARSAL"] = f"in miniature, links {SLOWER} times slower"
    report = Report("overlap", device_name(device), COLUMNS, notes)
    with rank_of(Cluster(world_size=8, links={"tp": links[0]}), 8, device) as context:
        stage = Stage(context, shapes(rehearse), effort, SLOWER if rehearse else 1)
        _measure(todo, stage, report, options)
    return report


def _check(options: Namespace) -> None:
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("dhellam bench overlap needs a GPU: rehearse it with --device cpu")
    unknown = [plan for plan in options.plans if plan not in PLANS]
    if unknown:
        raise ValueError(f"--plans: '{unknown[0]}' is not a plan: use {', '.join(PLANS)}")
    missing = [plan for plan in ("sequential", "megatron") if plan not in options.plans]
    if missing:
        raise ValueError(f"--plans: '{missing[0]}' must be among them, others are compared to it")
    if not options.memory_slack >= 0:
        raise ValueError(f"--memory_slack {options.memory_slack} must be at least 0")
    counts = options.micro_batches
    if len(counts) != 2 or counts[0] == counts[1] or min(counts) < 1:
        raise ValueError(f"--micro_batches {counts}: give two different numbers of at least 1")


def _links(options: Namespace) -> list[Link]:
    if options.cluster is not None:
        return [Cluster.load(options.cluster).links["tp"]]
    return [parse_link(text) for text in options.links]


def _measure(todo: list[Cell], stage: Stage, report: Report, options: Namespace) -> None:
    """One cell after the other. One that fails is noted, and the others go on."""
    folder = Path(options.output)
    begin = time.perf_counter()
    longest = 0.0
    skipped = []
    for cell in todo:
        started = time.perf_counter()
        if started - begin + longest > options.budget:
            skipped.append(cell.name)
            continue
        try:
            outcome = stage.measure(cell)
        except Exception as error:
            report.notes[f"FAILED {cell.name}"] = f"{type(error).__name__}: {error}"
            print(f"{cell.name} FAILED: {error}", flush=True)
            stage.recover()
        else:
            report.rows += outcome.rows
            report.notes[cell.name] = outcome.note
            notes = {"conditions": outcome.note}
            print(
                Report(cell.name, report.device, COLUMNS, notes, outcome.rows).table(), flush=True
            )
            if cell.name in _PICTURED:
                outcome.draw(folder / f"overlap-{cell.file_name}.png")
        longest = max(longest, time.perf_counter() - started)
        report.save(folder)
    report.notes |= _levers(todo, report.rows)
    if skipped:
        report.notes["not measured, for lack of time"] = ", ".join(skipped)
    report.save(folder)


def _levers(todo: Sequence[Cell], rows: Sequence[Row]) -> Row:
    """What each lever does to the searched plan, against the same cell without it."""
    found = {row["cell"]: row["layer ms"] for row in rows if row["plan"] == "auto"}
    plain = {_without_lever(c): c.name for c in todo if not c.lever}
    notes: Row = {}
    for cell in todo:
        before = plain.get(_without_lever(cell))
        if cell.lever and cell.name in found and before in found:
            gain = found[before] / found[cell.name] - 1
            notes[f"lever: {cell.lever}"] = f"auto {gain:+.1%} faster than {before}"
    return notes


def _without_lever(cell: Cell) -> tuple[object, ...]:
    """What a cell and the same one with a lever have in common."""
    return cell.shape, cell.layers, cell.calibrated, cell.link.bandwidth, bool(cell.link.sms)
