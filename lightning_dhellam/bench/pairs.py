"""`dhellam bench pairs`: how much of each collective hides beside each compute operator.

The operators of one transformer layer are timed alone and two at a time: over an emulated link on
one device, or, when torchrun has started several processes, over the real one between them. The
number is what starting both together saves against one after the other, as a share of the shorter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.cells import SLOWER, parse_link, shapes
from lightning_dhellam.bench.report import Report, Row
from lightning_dhellam.bench.stage import rank_of
from lightning_dhellam.bench.workload import trunk
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Cluster, ParallelContext
from lightning_dhellam.plan import Lane
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.report.pictures import hidden_shares, save_heat_map

DESCRIPTION = "which operators hide which collectives: a heat map of this device and link"

_LEAST = 0.02
"""Share of the longest compute operator below which one hides little of anything."""


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse in miniature")
    parser.add_argument("--shape", default="a", help="a: Llama-3-70B width, b: Qwen3-14B width")
    parser.add_argument("--link", default="16sm:370", help="to emulate: copy:110, 16sm:200, ...")
    parser.add_argument("--cluster", default=None, help="its link instead: a name, or a file")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each that count")


def run(options: Namespace) -> Report:
    """Measure, and draw the heat map."""
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("dhellam bench pairs needs a GPU: rehearse it with --device cpu")
    device = torch.device(options.device)
    known = shapes(rehearse=device.type == "cpu")
    if options.shape not in known:
        raise ValueError(f"--shape '{options.shape}' is not a shape: use {', '.join(known)}")
    shape = known[options.shape]
    with _ranks(options, shape.ranks, device) as context:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        work = trunk(
            CausalLM(shape.config, context, dtype).to(device),
            1,
            shape.length,
            shape.micro_batch,
            1,
            processors=context.processors,
        )
        group = None if context.emulated else dist.group.WORLD
        profile = work.profile(group, options.repeats)
        notes = {"device": profile.fingerprint.device, "shape": options.shape}
        if context.emulated:
            notes["EMULATED"] = f"link {context.links[Lane.TP].calibrated(_sizes(profile))}"
        report = _report(profile, notes)
        if context.topology.rank == 0:
            path = Path(options.output) / f"pairs-{options.shape}-{date.today()}.png"
            save_heat_map(path, profile, least=_LEAST)
    return report


@contextmanager
def _ranks(options: Namespace, ranks: int, device: torch.device) -> Iterator[ParallelContext]:
    """A rank of an emulated cluster, or, under torchrun, of a real one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield from _real(device)
        return
    if options.cluster is not None:
        cluster = Cluster.load(options.cluster)
    else:
        link = parse_link(options.link)
        cluster = Cluster(ranks, {"tp": link.slower(SLOWER) if device.type == "cpu" else link})
    with rank_of(cluster, cluster.world_size, device) as context:
        yield context


def _real(device: torch.device) -> Iterator[ParallelContext]:
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        context = ParallelContext.create(device, tensor_parallel_size=dist.get_world_size())
        try:
            yield context
        finally:
            context.destroy()
    finally:
        dist.destroy_process_group()


def _sizes(profile: Profile) -> tuple[int, ...]:
    shapes = profile.fingerprint.shapes
    tokens = shapes["micro_batch_size"] * shapes["sequence_length"]
    return (tokens * shapes["hidden_size"],)


def _report(profile: Profile, notes: Row) -> Report:
    """A row for each collective, a column for each compute operator that takes some time."""
    alone = {row.operator: row.median for row in profile.timings if row.partner is None}
    collectives, computes, shares = hidden_shares(profile)
    longest = max(alone[key] for key in computes)
    kept = [j for j, key in enumerate(computes) if alone[key] >= _LEAST * longest]
    names = {j: computes[j].rsplit("/", 1)[-1] for j in kept}
    columns = ("collective", "alone us", *names.values())
    report = Report("pairs", profile.fingerprint.device.partition(",")[0], columns, notes)
    times = {names[j]: alone[computes[j]] * 1e6 for j in kept}
    report.rows.append({"collective": "(alone us)", **times})
    slowdowns = Costs.of(profile).slowdowns
    for i, key in enumerate(collectives):
        row: Row = {"collective": key.rsplit("/", 1)[-1], "alone us": alone[key] * 1e6}
        row |= {names[j]: float(shares[i, j]) for j in kept if not np.isnan(shares[i, j])}
        row["slowdowns"] = {b: pair for (a, b), pair in slowdowns.items() if a == key}
        report.rows.append(row)
    return report
