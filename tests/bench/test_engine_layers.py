"""The side of transformer-engine, with a stand-in for it that computes in plain torch.

What the stand-in has of the real one are the names and shapes of parameters, their order and the
form of the angles. Whether 8 bits are fast there, a GPU has to say.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_dhellam.bench.report import Report
from lightning_dhellam.bench.throughput.report import COLUMNS, add
from lightning_dhellam.bench.throughput.settings import ENGINES, Job, Settings
from lightning_dhellam.bench.throughput.worker import result_of

CASE = "llama-tiny:2:512:64:2"
SIDE = "transformer-engine:current"


class _Normed(nn.Module):
    """Parameters of a norm and of linear layers behind it."""

    def __init__(self, width: int, **weights: int) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(width))
        for name, rows in weights.items():
            setattr(self, name, nn.Parameter(torch.zeros(rows, width)))

    def norm(self, x: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scaled = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        return scaled.to(x.dtype) * self.layer_norm_weight


class TransformerLayer(nn.Module):
    """A layer as transformer-engine calls its parts."""

    firsts: ClassVar[list[bool]] = []

    def __init__(self, hidden: int, ffn: int, heads: int, **options: Any) -> None:
        super().__init__()
        size, groups = options["kv_channels"], options["num_gqa_groups"]
        assert options["attn_input_format"] == "bshd" and options["normalization"] == "RMSNorm"
        assert not options["fuse_qkv_params"] and options["activation"] == "swiglu"
        self._size, self._epsilon = size, options["layernorm_epsilon"]
        self.self_attention = nn.Module()
        rows = {"query_weight": heads * size, "key_weight": groups * size}
        qkv = _Normed(hidden, **rows, value_weight=groups * size)
        self.self_attention.layernorm_qkv = qkv
        self.self_attention.proj = nn.Linear(heads * size, hidden, bias=False)
        self.layernorm_mlp = _Normed(hidden, fc1_weight=2 * ffn)
        self.layernorm_mlp.fc2_weight = nn.Parameter(torch.zeros(hidden, ffn))
        self.to(options["device"], options["params_dtype"])

    def forward(self, x: Tensor, rotary_pos_emb: Tensor, is_first_microbatch: bool) -> Tensor:
        self.firsts.append(is_first_microbatch)
        qkv, mlp = self.self_attention.layernorm_qkv, self.layernorm_mlp
        read = qkv.norm(x, self._epsilon)
        q, k, v = (
            (read @ weight.t()).unflatten(-1, (-1, self._size)).transpose(1, 2)
            for weight in (qkv.query_weight, qkv.key_weight, qkv.value_weight)
        )
        q, k = (_turned(heads, rotary_pos_emb) for heads in (q, k))
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.self_attention.proj(found.transpose(1, 2).flatten(2))
        gate, up = (mlp.norm(x, self._epsilon) @ mlp.fc1_weight.t()).chunk(2, dim=-1)
        return x + (functional.silu(gate) * up) @ mlp.fc2_weight.t()


def _turned(heads: Tensor, angles: Tensor) -> Tensor:
    """`heads` [B, H, S, D] turned by angles [S, 1, 1, D], whose halves are alike."""
    assert angles.dtype is torch.float32
    angles = angles[:, 0, 0]
    one, other = heads.float().chunk(2, dim=-1)
    turned = heads.float() * angles.cos() + torch.cat([-other, one], dim=-1) * angles.sin()
    return turned.to(heads.dtype)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[TransformerLayer]:
    """The stand-in, installed."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common")
    modules = {name: ModuleType(name) for name in (*names, "transformer_engine.common.recipe")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    layers, recipes = modules[names[1]], modules["transformer_engine.common.recipe"]
    layers.TransformerLayer = TransformerLayer  # type: ignore[attr-defined]
    layers.fp8_autocast = lambda **options: nullcontext(options)  # type: ignore[attr-defined]
    recipes.Float8CurrentScaling = object  # type: ignore[attr-defined]
    monkeypatch.setattr(TransformerLayer, "firsts", [])
    return TransformerLayer


def _job(side: str, case: str = CASE) -> Job:
    return Job(case, side, "cpu", "interleaved", warm_up=1, steps=1)


def test_its_layers_have_the_weights_and_places_of_hugging_faces(
    engine: type[TransformerLayer],
) -> None:
    told: list[str] = []
    found, eager = result_of(_job(SIDE), told.append), result_of(_job("eager"))
    assert "failed" not in found, found
    assert found["losses"] == pytest.approx(eager["losses"], rel=2e-3)
    assert found["grad norm"] == pytest.approx(eager["grad norm"], rel=2e-2)
    # Two layers, two micro-batches, two steps; weights are cast in the first of each step.
    assert engine.firsts == [True, True, False, False] * 2
    first, *others = told
    assert first == "while its model was built" and "kernels are compiled" in others[0]
    assert others[-1] == "in the steps that are timed"


def test_what_it_cannot_do_is_said(
    engine: type[TransformerLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = result_of(_job("transformer-engine:blockwise"))["failed"]
    assert "no Float8BlockScaling: pip install -U" in blocks
    adapters = result_of(_job(SIDE, f"{CASE}:full"))["failed"]
    assert "neither adapters nor gradient checkpointing: leave them out" in adapters
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    missing = result_of(_job(SIDE))["failed"]
    assert missing.startswith("ValueError: this side needs transformer-engine: pip install")


def test_ours_in_8_bits_is_compared_with_theirs_in_the_same() -> None:
    report = Report("throughput", "cpu", COLUMNS)
    for side, seconds in (("ours:current", 1.0), (SIDE, 1.25), ("eager", 2.0)):
        result = {"tokens": 100, "seconds": seconds, "losses": [1.0]}
        add(report, _job(side), result, 989.0)
    ours, engine, _ = report.rows
    assert (ours["over engine"], ours["ratio"]) == (1.25, 2.0)
    assert "ratio" not in engine
    assert Settings(sides=("ours", *ENGINES)).jobs()
