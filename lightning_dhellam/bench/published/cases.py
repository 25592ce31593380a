"""The published bars, each with its setting: what was published of it, and what is assumed.

Published are cluster, parallel sizes, the number of parameters, the gain, and the rate of the
baseline as the bars show it (DHeLlam's charts of A40 and A800; TWIST's note of March 2026). Of the
shapes only that of the example that came with the code is: 8192 wide, 28672 inside, 64 heads each
with a key of its own, 32,000 tokens of vocabulary, sequences of 8192 tokens. The successor's
authors found that the original code had computed zero gradients: its gains are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_dhellam.bench.shapes import shapes
from lightning_dhellam.memory import Run
from lightning_dhellam.models import ModelConfig, preset
from lightning_dhellam.parallel import Topology

_SHAPE = "shape of the example that came with the code, as deep as its parameters say"


@dataclass(frozen=True)
class Case:
    """A published bar.

    Attributes:
        name: of the model and what it was trained on.
        config: of the model.
        cluster: a name of `dhellam clusters`.
        gpus: of the run.
        sizes: parallel sizes, by the names of `Topology`.
        length: tokens of a sequence.
        micro_batch: sequences that go through the layers together.
        samples: of a step, on each data-parallel rank.
        gain: what was published over Megatron-LM, as a factor of its rate.
        rate: TFLOP/s of a GPU that the bar of Megatron-LM shows; None where none is.
        assumed: what is not published of the setting.
        whole: whether that rate counts attention to all tokens, as Megatron-LM did, or half of it.
    """

    name: str
    config: ModelConfig
    cluster: str
    gpus: int
    sizes: dict[str, int]
    length: int
    micro_batch: int
    samples: int
    gain: float
    rate: float | None
    assumed: str
    whole: bool = True

    def run(self, plan: str, schedule: str) -> Run:
        """The run under a plan and, of a pipeline, a schedule."""
        return Run(
            self.config,
            Topology(world_size=self.gpus, **self.sizes),
            self.samples,
            self.length,
            micro_batch_size=self.micro_batch,
            plan=plan,
            schedule=schedule,
        )


_LLAMA = preset("llama-3-70b", num_query_groups=64, vocab_size=32000, max_sequence_length=32768)
_GPT = preset("gpt-3-6.7b", max_sequence_length=16384)
_GPT_WIDE = replace(
    _GPT, hidden_size=8192, ffn_hidden_size=32768, num_attention_heads=64, num_query_groups=64
)
_LLAMA_8B = preset("llama-3-8b", max_sequence_length=16384)
_QWEN = replace(shapes(rehearse=False)["b"].config, num_layers=40, vocab_size=151936)


def _a40(name: str, config: ModelConfig, sizes: dict[str, int], gain: float, rate: float) -> Case:
    """256 sequences of 8192 tokens in a step, or half as many of twice the length."""
    long = sizes.get("cp_size", 1)
    model_parallel = sizes["tp_size"] * sizes.get("pp_size", 1) * long
    shape = _SHAPE if config.hidden_size == _LLAMA.hidden_size else "shape of its preset"
    return Case(
        f"A40 {name}{' cp 2' if long > 1 else ''}",
        config,
        "a40-64",
        64,
        sizes,
        8192 * long,
        1,
        256 // long // (64 // model_parallel),
        gain,
        rate,
        f"{shape}; 8192 tokens of a sequence on a rank; {256 // long} sequences in a step, each a"
        " micro-batch",
    )


def _layers(config: ModelConfig, count: int) -> ModelConfig:
    return replace(config, num_layers=count)


def _of_tables() -> tuple[Case, ...]:
    models: tuple[tuple[str, ModelConfig, dict[str, int], tuple[Any, ...]], ...] = (
        ("Llama 8B", _LLAMA_8B, {"tp_size": 4}, (1.31, 64.5, 1.30, 60.0)),
        ("Llama 25B", _layers(_LLAMA, 25), {"tp_size": 8}, (1.40, 54.0, 1.30, 38.5)),
        ("Llama 39B", _layers(_LLAMA, 40), {"tp_size": 8, "pp_size": 2}, (1.27, 68.0, 1.39, 52.0)),
        ("GPT 6.7B", _GPT, {"tp_size": 4}, (1.26, 61.5, 1.31, 57.0)),
        ("GPT 18B", _layers(_GPT_WIDE, 22), {"tp_size": 8}, (1.40, 40.5, 1.22, 28.5)),
        ("GPT 30B", _layers(_GPT_WIDE, 37), {"tp_size": 8, "pp_size": 2}, (1.36, 58.0, 1.23, 42.0)),
    )
    short = [_a40(name, config, sizes, *bars[:2]) for name, config, sizes, bars in models]
    long = [
        _a40(name, config, {**sizes, "cp_size": 2}, *bars[2:])
        for name, config, sizes, bars in models
    ]
    return (*short, *long)


def _a800(length: int, ranks: int, gain: float, rate: float) -> Case:
    sizes = {"tp_size": 8, "cp_size": ranks, "pp_size": 2}
    assumed = f"{_SHAPE}; 32 sequences in a step of each replica, each a micro-batch"
    name = f"A800 Llama 66B {length // 1024}k"
    config = _layers(_LLAMA, 67)
    return Case(name, config, "a800-64", 64, sizes, length, 1, 32, gain, rate, assumed)


def _twist(cluster: str, gpus: int, gain: float, rate: float) -> Case:
    assumed = (
        "shape of Qwen3-14B without norms of queries and keys, by which its note's layer of 16.5 ms"
        " computes at 41% MFU with 21.9 ms; 8 micro-batches of 4 sequences of 8192 tokens in a step"
        " of each replica"
    )
    name = f"{cluster.partition('-')[0].upper()} Qwen 14.8B, {gpus} GPUs"
    return Case(name, _QWEN, cluster, gpus, {"tp_size": 8}, 8192, 4, 32, gain, rate, assumed, False)


CASES: tuple[Case, ...] = (
    *_of_tables(),
    _a800(16384, 2, 1.07, 186.0),
    _a800(32768, 4, 1.24, 161.0),
    Case(
        "A800 Phi-3.5-MoE 42B",
        preset("phi-3.5-moe"),
        "a800-64",
        64,
        {"ep_size": 8, "pp_size": 4},
        4096,
        2,
        32,
        1.15,
        None,
        "experts used evenly; 16 micro-batches of 2 sequences of 4096 tokens in a step of each"
        " replica",
    ),
    # 41 to 47% and 36 to 46% MFU, of 989 TFLOP/s.
    _twist("h200-64", 8, 0.47 / 0.41, 0.41 * 989),
    _twist("h800-64", 32, 0.46 / 0.36, 0.36 * 989),
)
