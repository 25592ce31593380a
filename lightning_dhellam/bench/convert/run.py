"""Times every way to read and to write a folder in turn, for a disk's rate drifts."""

from __future__ import annotations

import random
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lightning_dhellam.bench.convert.files import (
    forget,
    read_plain,
    read_tensors,
    write_plain,
    write_tensors,
)
from lightning_dhellam.bench.convert.report import COLUMNS, row_of
from lightning_dhellam.bench.convert.settings import Settings
from lightning_dhellam.bench.report import Report, device_name
from lightning_dhellam.models import (
    CausalLM,
    export_huggingface,
    import_huggingface,
    parameter_count,
    preset,
    save_huggingface,
)
from lightning_dhellam.models.stored import stored_tensors
from lightning_dhellam.parallel import ParallelContext

_CPU = torch.device("cpu")
WAYS = ("disk", "safetensors", "ours")


def measure(settings: Settings, folder: Path) -> Report:
    """Measure reading and writing, of the disk that `folder` is on."""
    config = preset(settings.preset, num_layers=settings.layers)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    model = CausalLM(config, ParallelContext.single(_CPU), dtype, drawn=False)
    _draw(model)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".convert-", dir=folder) as place:
        bench = _Bench(model, Path(place))
        wrong = bench.wrong()
        seconds: dict[str, dict[str, list[float]]] = {
            does: {way: [] for way in WAYS} for does in ("read", "write")
        }
        draw = random.Random(settings.rounds)
        for number in range(settings.rounds):
            for does, of_ways in seconds.items():
                for way in draw.sample(WAYS, len(WAYS)):
                    of_ways[way].append(getattr(bench, does)(way))
            print(f"round {number + 1} of {settings.rounds}", flush=True)
    report = Report("convert", device_name(_CPU), COLUMNS)
    report.notes["model"] = f"{settings.preset} of {settings.layers} layers"
    report.notes["parameters"] = parameter_count(config)
    report.notes["files"] = f"{bench.size / 1e9:.2f} GB in {len(bench.files)}, {settings.dtype}"
    for does, of_ways in seconds.items():
        for way, found in of_ways.items():
            row = row_of(does, way, bench.size, found, of_ways["disk"])
            report.rows.append(
                {"does": does, "by": way, "failed": wrong} if wrong and way == "ours" else row
            )
    report.save(folder)
    return report


class _Bench:
    def __init__(self, model: CausalLM, place: Path) -> None:
        self.model, self.place = model, place
        self.ours = place / "ours"
        save_huggingface(model, self.ours)
        self.files = sorted(self.ours.glob("*.safetensors"))
        self.sizes = [file.stat().st_size for file in self.files]
        self.size = sum(self.sizes)
        tensors = export_huggingface(model)
        self.tensors = {
            file.name: {name: tensors[name] for name in _names(file)} for file in self.files
        }

    def wrong(self) -> str | None:
        """What came out otherwise than it went in, if anything did."""
        stored = stored_tensors(self.ours, "a model")
        for tensors in self.tensors.values():
            for name, tensor in tensors.items():
                if not torch.equal(stored[name][:], tensor):
                    return f"{name} is not written as it is"
        before = _digests(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))
        import_huggingface(self.model, self.ours)
        return None if _digests(self.model) == before else "what is read is not what was written"

    def read(self, way: str) -> float:
        forget(self.files)
        return _seconds(
            {
                "disk": lambda: read_plain(self.files),
                "safetensors": lambda: read_tensors(self.ours, self.tensors),
                "ours": lambda: import_huggingface(self.model, self.ours),
            }[way]
        )

    def write(self, way: str) -> float:
        target = self.place / "written"
        found = _seconds(
            {
                "disk": lambda: write_plain(target, self.sizes),
                "safetensors": lambda: write_tensors(target, self.tensors),
                "ours": lambda: save_huggingface(self.model, target),
            }[way]
        )
        shutil.rmtree(target)
        return found


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _draw(model: CausalLM) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)


def _digests(model: CausalLM) -> list[int]:
    every = (parameter.detach().view(torch.uint8) for parameter in model.parameters())
    return [zlib.crc32(parameter.numpy().tobytes()) for parameter in every]


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
