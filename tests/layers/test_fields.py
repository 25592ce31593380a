"""Fields of Megatron-core's configuration: known ones may have any value, others are refused."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_dhellam.layers import lower
from lightning_dhellam.layers.fields import HARMLESS, check_unknown
from lightning_dhellam.layers.transformer import CHECKED
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import SMALL

NAMES = sorted(field.name for field in fields(TransformerConfig))
# What one of the supported versions lacks.
ONLY_BEFORE = {"async_tensor_model_parallel_allreduce", "moe_use_legacy_grouped_gemm"}
ONLY_SINCE = {"flash_attention_version", "inference_cuda_graph_scope"}


@pytest.fixture
def config() -> TransformerConfig:
    return SMALL.transformer_config(ParallelContext.single(torch.device("cpu")))


def _other(value: Any) -> Any:
    """A value that differs from `value`, of its type where that is plain."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float | str):
        return value + type(value)(1)
    return 1 if value is None else None


def _refusal(config: TransformerConfig, name: str, value: Any) -> str:
    """What is said of `config` with `value`; empty if nothing is."""
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        check_unknown(config, CHECKED)
    except ValueError as error:
        return str(error)
    finally:
        setattr(config, name, before)
    return ""


def test_every_field_that_lowering_does_not_know_is_refused(config: TransformerConfig) -> None:
    check_unknown(config, CHECKED)
    unknown = set(NAMES) - HARMLESS - CHECKED
    assert len(unknown) > 90
    for name in unknown:
        default = getattr(config, name)
        value = _other(default)
        assert _refusal(config, name, value) == (
            f"TransformerConfig.{name}={value!r} cannot be lowered to operators: leave it at"
            f" {default!r}"
        )


@pytest.mark.parametrize("part", ["model", "layer"])
def test_lowering_looks_at_the_models_configuration_and_at_each_layers(part: str) -> None:
    model = CausalLM(SMALL, ParallelContext.single(torch.device("cpu")))
    odd = replace(model.transformer_config, mtp_loss_scaling_factor=0.5)
    if part == "model":
        model.transformer_config = odd
    else:
        model.layers[1].config = odd
    with pytest.raises(ValueError, match=r"mtp_loss_scaling_factor=0\.5 cannot be lowered"):
        lower(model)


def test_harmless_fields_may_have_any_value(config: TransformerConfig) -> None:
    for name in HARMLESS & set(NAMES):
        assert not _refusal(config, name, _other(getattr(config, name)))


def test_every_known_field_is_one_of_a_supported_version() -> None:
    missing = (HARMLESS | CHECKED) - set(NAMES)
    assert missing in (ONLY_BEFORE, ONLY_SINCE)
    assert not HARMLESS & CHECKED


@dataclass
class OwnConfig(TransformerConfig):
    """A user's, for a layer of his own."""

    gain: float = 1.0


def test_a_field_of_the_users_own_is_refused_unless_it_has_its_default(
    config: TransformerConfig,
) -> None:
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    own = OwnConfig(**values)
    check_unknown(own, CHECKED)
    with pytest.raises(ValueError, match=r"TransformerConfig\.gain=2\.0 .* leave it at 1\.0"):
        check_unknown(replace(own, gain=2.0), CHECKED)
