"""The profile of one shard of a model, taken on the device at hand: one layer, one rank, no others.

The rank is one of an emulated cluster of the run's sizes, so that its GEMMs have the shapes that
they would have there. Links are played, and what they take is predicted another way.
"""

from __future__ import annotations

import torch

from lightning_dhellam.advice.lowering import are_alike, shortened
from lightning_dhellam.bench.shapes import rank_of
from lightning_dhellam.bench.workload import whole
from lightning_dhellam.memory import Run
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.search.measure import Profile

_SEED = 1234


def shard_profile(run: Run, cluster: Cluster, device: torch.device, repeats: int = 7) -> Profile:
    """Measure the operators of a rank's share of a model: embedding, one layer of many, head.

    Args:
        run: whose ranks are meant; its pipeline is left out.
        cluster: that it would run on.
        device: to measure on.
        repeats: runs of each measurement.

    Raises:
        ValueError: the model is not of its configuration alone, or its layers are not all alike.
        BenchError: an operator could not be timed; it is named.
    """
    if run.build is not None or not are_alike(run.config):
        raise ValueError(
            "--measure takes one layer for all of them, and this model's are not alike: profile it"
            " with `dhellam search --profile FILE`, and give that"
        )
    topology = run.topology.stage
    played = Cluster(topology.world_size, cluster.links_of(topology), name=cluster.name)
    with rank_of(
        played,
        topology.tp_size,
        device,
        topology.cp_size,
        topology.ep_size,
        expert_tensor_ranks=topology.etp_size,
    ) as context:
        torch.manual_seed(_SEED)
        dtype = PRECISIONS[run.precision].dtype
        model = CausalLM(shortened(run.config, 1), context, dtype).to(device)
        size = (run.micro_batch_size, run.length)
        tokens = torch.randint(0, run.config.vocab_size, size)
        work = whole(model, {"tokens": tokens, "labels": tokens}, run.micro_batch_size)
        return work.profile(repeats=repeats)
