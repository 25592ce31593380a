"""`dhellam bench pipeline`: the folded pipeline against Megatron-core's 1F1B, on CPU with gloo.

All sides have the same weights and micro-batches, split the same model over the same processes,
and run forward and backward of a step without an optimizer. On one machine the processes share its
cores, so the times say what the schedules cost there, not what a cluster would gain; losses and
gradient norms show that all sides compute the same.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.report import Report, device_name
from lightning_dhellam.models import ModelConfig, preset

DESCRIPTION = "the folded pipeline against Megatron-core's 1F1B, CPU processes with gloo"

COLUMNS = ("side", "stages", "micro-batches", "ms", "tokens/s", "loss", "grad norm", "error")
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Settings:
    """What every process of the benchmark runs.

    Attributes:
        config: of the model.
        stages: processes.
        micro_batches: of one sequence each, to a step.
        length: tokens of a sequence.
        steps: timed steps of each side.
    """

    config: ModelConfig
    stages: int
    micro_batches: int
    length: int
    steps: int


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--preset", default="llama-tiny", help="shape of the model")
    parser.add_argument("--layers", type=int, default=8, help="a multiple of the stages")
    parser.add_argument("--stages", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--micro_batches", type=int, default=8, help="of one sequence, to a step")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median counts")


def run(options: Namespace) -> Report:
    """Measure every side in the same processes.

    Raises:
        ValueError: stages that Megatron-core's 1F1B cannot split the layers over.
    """
    stages, layers = options.stages, options.layers
    if stages < 2 or layers % stages or layers < 2 * stages - 2:
        raise ValueError(
            f"--layers {layers} --stages {stages}: Megatron-core's 1F1B needs two stages or more,"
            " and as many layers on each: make --layers a multiple of --stages"
        )
    config = preset(options.preset, num_layers=layers, tie_embeddings=False)
    settings = Settings(config, stages, options.micro_batches, options.sequence, options.steps)
    notes = {"preset": options.preset, "layers": layers, "sequence": settings.length}
    report = Report("pipeline", device_name(torch.device("cpu")), COLUMNS, notes)
    sides = _measured(settings)
    reference = sides["Megatron-core 1F1B"]
    for name, outcome in sides.items():
        error = max(_relative(outcome[k], reference[k]) for k in ("loss", "grad norm"))
        row = _row(name, settings, outcome) | {"error": error}
        if not error <= _TOLERANCE:
            row["failed"] = "computes another loss or gradient than Megatron-core"
        report.rows.append(row)
    return report


def _row(name: str, settings: Settings, outcome: dict[str, Any]) -> dict[str, Any]:
    seconds = median(outcome["seconds"])
    return {
        "side": name,
        "stages": settings.stages,
        "micro-batches": settings.micro_batches,
        "ms": seconds * 1000,
        "tokens/s": settings.micro_batches * settings.length / seconds,
        "loss": outcome["loss"],
        "grad norm": outcome["grad norm"],
        "seconds": outcome["seconds"],
    }


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)


def _measured(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the first stage saw of each side."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.pt"
        mp.spawn(_process, (settings, store.port, path), nprocs=settings.stages)
        found: dict[str, dict[str, Any]] = torch.load(path, weights_only=True)
        return found


def _process(rank: int, settings: Settings, port: int, path: Path) -> None:
    # Imported here: the parent needs no Megatron-core to print its help.
    from lightning_dhellam.bench.stages import outcomes

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.stages)
    found = outcomes(settings)
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()
