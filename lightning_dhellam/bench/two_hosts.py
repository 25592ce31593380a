"""`dhellam bench two-hosts`: hiding communication over a real, slow network, against Megatron-core.

Two processes in network namespaces of one machine, a core each, joined by a link whose rate is
limited: tensor parallel 2 with gloo. Everything is real, only slow. All sides train the same Llama
from the same weights on the same batch, in turn, on the same hosts; `megatron-core` is
Megatron-core's own GPTModel under its own forward-backward function, the others are our plans.

The bound is what the busier of compute and link needs for a step, each undisturbed: a step whose
collectives send nothing, and the collectives of a step without anything else, timed among the
others. What the simulator says is of operators that were timed among the steps as well: machines
drift. A host has one core, on which gloo copies and sends as well, and the kernel's network with
it: `cpu s` is what all of it costs in a step.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.hosts import check_tools, two_hosts
from lightning_dhellam.bench.report import Report, Row

DESCRIPTION = "our plans and Megatron-core over a link of limited rate between two hosts (root)"

COLUMNS = (
    "Gbit/s", "achieved", "side", "step s", "spread", "over sequential", "over megatron-core",
    "of bound", "cpu s", "predicted s", "error", "parity",
)  # fmt: skip
SIDES = (
    "sequential", "megatron", "dhellam", "interleaved", "order", "auto", "megatron-core",
)  # fmt: skip
_ALIKE = ("order",)
"""Not timed unless asked for: on a host, whose processor communication takes in any order, this is
the plan of `auto`."""
_COUNTS = (
    "layers", "hidden", "ffn", "length", "micro_batch", "micro_batches", "vocabulary", "rounds",
)  # fmt: skip


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--rates", type=list[float], default=[0.5, 1.0, 2.0], help="Gbit/s")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 256")
    parser.add_argument("--ffn", type=int, default=1024, help="width of the MLP, even")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--micro_batch", type=int, default=4, help="sequences of one")
    parser.add_argument("--micro_batches", type=int, default=16, help="to a step")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more comes before")
    parser.add_argument("--sides", type=list[str], default=[s for s in SIDES if s not in _ALIKE])


def run(options: Namespace) -> Report:
    """Measure every side at every rate."""
    check_tools()
    _check(options)
    settings = {name: getattr(options, name) for name in ("rates", *_COUNTS, "sides")}
    report = Report("two-hosts", "CPU", COLUMNS, {"CPU": cpu_model(), "settings": settings})
    with two_hosts("lightning_dhellam.bench.host", settings) as results:
        for result in results:
            report.rows += _rows(result)
            report.notes[f"{result['rate']:g} Gbit/s"] = _lanes(result)
            report.save(Path(options.output))
            print(f"{result['rate']:g} Gbit/s done", flush=True)
    return report


def _check(options: Namespace) -> None:
    unknown = [side for side in options.sides if side not in (*SIDES, "pairs")]
    if unknown:
        raise ValueError(f"--sides: '{unknown[0]}' is not a side: use {', '.join(SIDES)}, pairs")
    if "sequential" not in options.sides:
        raise ValueError("--sides: 'sequential' must be among them, all others are compared to it")
    if options.hidden % 256:
        raise ValueError(f"--hidden {options.hidden} must be a multiple of 256: heads of 64 on two")
    for name in _COUNTS:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    if options.ffn % 2:
        raise ValueError(f"--ffn {options.ffn} must be even: half for each host")
    if not all(rate > 0 for rate in options.rates):
        raise ValueError(f"--rates {options.rates}: each must be more than 0 Gbit/s")


def _lanes(result: dict[str, Any]) -> str:
    bound = _bound(result)
    return (
        f"compute {result['compute']:.3f} s, link {result['link']:.3f} s, so the bound is"
        f" {bound:.3f} s; limit of the plan: {result['resource']}; other processes took"
        f" {result['others']:.0%} of the processors"
    )


def _rows(result: dict[str, Any]) -> list[Row]:
    sides = {side["side"]: side for side in result["sides"]}
    return [_row(side, sides, result) for side in result["sides"]]


def _bound(result: dict[str, Any]) -> float:
    return float(max(result["compute"], result["link"]))


def _row(side: Row, sides: dict[str, Row], result: dict[str, Any]) -> Row:
    seconds, predicted = side["seconds"], side["predicted"]
    theirs = sides.get("megatron-core")
    return {
        "Gbit/s": result["rate"],
        "achieved": result["achieved"],
        "side": side["side"],
        "step s": seconds,
        "spread": side["spread"],
        "over sequential": sides["sequential"]["seconds"] / seconds,
        "over megatron-core": theirs["seconds"] / seconds if theirs else None,
        "of bound": _bound(result) / seconds,
        "cpu s": side["cpu"],
        "predicted s": predicted,
        "error": predicted / seconds - 1 if predicted is not None else None,
        "parity": side["parity"],
        "compute s": result["compute"],
        "link s": result["link"],
    }


def cpu_model() -> str:
    """What the kernel calls this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
