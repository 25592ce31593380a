"""What the benchmarks of overlap train: shapes of layers, a rank of a cluster, and its link."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from lightning_dhellam.models import ModelConfig, preset
from lightning_dhellam.parallel import Cluster, Link, ParallelContext

SLOWER = 1000
"""Times that links are slower in a rehearsal, as its layers are smaller."""
_UNUSED_VOCABULARY = 512
_LINK = re.compile(r"(?:copy|(?P<sms>\d+)sm):(?P<bandwidth>\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Shape:
    """Layers as wide as those of a model, on one rank of those that share them.

    Attributes:
        config: The model; its vocabulary is not used.
        length: Tokens of a sequence.
        micro_batch: Sequences that go through the layers together.
        ranks: The tensor-parallel size.
        context_ranks: How many ranks share each sequence.
        expert_ranks: How many ranks, with samples of their own, share the experts.
    """

    config: ModelConfig
    length: int
    micro_batch: int
    ranks: int
    context_ranks: int = 1
    expert_ranks: int = 1

    @property
    def world_size(self) -> int:
        """The ranks of the cluster."""
        return self.ranks * self.context_ranks * self.expert_ranks


def shapes(rehearse: bool) -> dict[str, Shape]:
    """The shapes by letter, as in the published tables; to rehearse with, miniatures of them."""
    return _miniatures() if rehearse else _published()


def _miniatures() -> dict[str, Shape]:
    config = ModelConfig(8, 64, 128, 8, 8, _UNUSED_VOCABULARY, max_sequence_length=128)
    grouped = replace(config, num_attention_heads=16)
    return {
        # As wide as 8 bits take: multiples of 16 on each rank.
        "a": Shape(replace(config, hidden_size=128), 64, 1, 8),
        "b": Shape(config, 32, 2, 8),
        "c": Shape(config, 128, 1, 8, 4),
        "d": Shape(grouped, 128, 1, 8, 4),
        "e": Shape(replace(config, num_query_groups=2), 128, 1, 8),
        "m": Shape(_mixture(hidden_size=64, expert_ffn_hidden_size=96), 128, 2, 1, 1, 8),
    }


def _published() -> dict[str, Shape]:
    llama = preset("llama-3-70b", vocab_size=_UNUSED_VOCABULARY)
    qwen = replace(
        llama,
        hidden_size=5120,
        ffn_hidden_size=17408,
        num_attention_heads=40,
        num_query_groups=8,
        head_dim=128,
    )
    narrow = preset("llama-3-8b", vocab_size=_UNUSED_VOCABULARY, max_sequence_length=32768)
    long = replace(llama, max_sequence_length=32768)
    # As wide as the 66B of the published long sequences, whose heads have keys of their own.
    ungrouped = replace(long, num_query_groups=long.num_attention_heads)
    return {
        "a": Shape(llama, 8192, 1, 8),
        "b": Shape(qwen, 8192, 4, 8),
        "c": Shape(ungrouped, 32768, 1, 8, 4),
        "d": Shape(long, 32768, 1, 8, 4),
        "e": Shape(narrow, 32768, 1, 8),
        "m": Shape(_mixture(), 4096, 2, 1, 1, 8),
    }


def _mixture(**sizes: int) -> ModelConfig:
    """Phi-3.5-MoE, with other sizes; without the output layer's bias, which `GPTModel` has not."""
    return preset("phi-3.5-moe", vocab_size=_UNUSED_VOCABULARY, output_bias=False, **sizes)


def parse_link(text: str) -> Link:
    """The link written `copy:110`, a copy engine at 110 GB/s, or `16sm:200`, 16 SMs at 200 GB/s.

    Raises:
        ValueError: It is written otherwise.
    """
    match = _LINK.fullmatch(text)
    if match is None:
        raise ValueError(
            f"link '{text}': write copy:110 for a copy engine at 110 GB/s, or 16sm:200 for 16 SMs"
            " at 200 GB/s"
        )
    return Link(float(match["bandwidth"]) * 1e9, sms=int(match["sms"] or 0))


@contextmanager
def rank_of(
    cluster: Cluster,
    ranks: int,
    device: torch.device,
    context_ranks: int = 1,
    expert_ranks: int = 1,
    stages: int = 1,
    expert_tensor_ranks: int | None = None,
) -> Iterator[ParallelContext]:
    """Play a rank of `cluster`, of so many that share layers, sequences, experts and stages.

    Each expert is shared by as many ranks as a layer is, unless `expert_tensor_ranks` are given.
    """
    cluster.join()
    try:
        context = ParallelContext.create(
            device,
            tensor_parallel_size=ranks,
            pipeline_parallel_size=stages,
            context_parallel_size=context_ranks,
            expert_parallel_size=expert_ranks,
            expert_tensor_parallel_size=expert_tensor_ranks,
            cluster=cluster,
        )
        try:
            yield context
        finally:
            context.destroy()
    finally:
        dist.destroy_process_group()
