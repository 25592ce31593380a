"""Megatron-core's model of benchmarks, with a stand-in for transformer-engine's layers."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from lightning_dhellam.bench import megatron_model
from lightning_dhellam.models.attention import SdpaCoreAttention
from lightning_dhellam.models.spec import llama_layer_spec


class _TheirAttention(nn.Module):
    """Stands for transformer-engine's, which shares sequences."""


@pytest.mark.parametrize(("sharing", "attends"), [(1, SdpaCoreAttention), (2, _TheirAttention)])
def test_sequences_are_shared_by_transformer_engines_own_attention(
    sharing: int, attends: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    extensions = ModuleType("megatron.core.extensions.transformer_engine")
    extensions.TENorm = nn.LayerNorm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, extensions.__name__, extensions)
    monkeypatch.setattr(
        gpt_layer_specs,
        "get_gpt_layer_with_transformer_engine_spec",
        lambda: llama_layer_spec(attends=_TheirAttention),
    )
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, context_parallel_size=sharing
    )
    spec, norm = megatron_model._of_transformer_engine(config)
    assert spec.submodules.self_attention.submodules.core_attention is attends
    assert norm is nn.LayerNorm
    # Others are taken only where they are installed, and compute something else in places.
    assert config.attention_backend is AttnBackend.fused
