"""Profiles one layer, and draws which of its operators hide which collectives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_dhellam.bench.pairs.report import LEAST, report_of
from lightning_dhellam.bench.pairs.settings import Settings
from lightning_dhellam.bench.report import Report, Row, pick_device
from lightning_dhellam.bench.shapes import rank_of
from lightning_dhellam.bench.workload import trunk
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.report.pictures import save_heat_map


def measure(settings: Settings, folder: Path) -> Report:
    """Measure, and draw the heat map."""
    shape = settings.trained_shape()
    with _rank(settings) as context:
        dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
        work = trunk(
            CausalLM(shape.config, context, dtype).to(context.device),
            1,
            shape.length,
            shape.micro_batch,
            1,
        )
        group = None if context.emulated else dist.group.WORLD
        profile = work.profile(group, settings.repeats)
        notes: Row = {"device": profile.fingerprint.device, "shape": settings.shape}
        if context.emulated:
            sizes = _sizes(profile)
            links = (f"{name}: {link.calibrated(sizes)}" for name, link in context.links.items())
            notes["EMULATED"] = f"link {'; '.join(links)}"
        report = report_of(profile, notes)
        if context.topology.rank == 0:
            path = folder / f"pairs-{settings.shape}-{date.today()}.png"
            save_heat_map(path, profile, least=LEAST)
    return report


@contextmanager
def _rank(settings: Settings) -> Iterator[ParallelContext]:
    """A rank of an emulated cluster, or, under torchrun, of a real one."""
    device = pick_device(settings.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield from _real(device, shared=settings.trained_shape().context_ranks > 1)
        return
    cluster, sharing = settings.played_cluster(), settings.trained_shape().context_ranks
    with rank_of(cluster, cluster.world_size // sharing, device, sharing) as context:
        yield context


def _real(device: torch.device, *, shared: bool) -> Iterator[ParallelContext]:
    """A rank of those that share the layers, or the sequences."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        world = dist.get_world_size()
        context = ParallelContext.create(
            device,
            tensor_parallel_size=1 if shared else world,
            context_parallel_size=world if shared else 1,
        )
        try:
            yield context
        finally:
            context.destroy()
    finally:
        dist.destroy_process_group()


def _sizes(profile: Profile) -> tuple[int, ...]:
    """A size in bytes about as large as what a collective of the layer brings."""
    shapes = profile.fingerprint.shapes
    tokens = shapes["micro_batch_size"] * shapes["sequence_length"]
    return (tokens * shapes["hidden_size"],)
