"""Language models of stock Megatron-core modules, their presets and Hugging Face weights."""

from lightning_dhellam.models.adapters import MergedWeights, adapter_conversions, add_lora
from lightning_dhellam.models.causal_lm import CausalLM
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.counts import (
    active_parameter_count,
    crossing_bytes,
    parameter_count,
    training_flops_per_token,
)
from lightning_dhellam.models.huggingface import (
    export_huggingface,
    export_llama,
    huggingface_tensors,
    import_huggingface,
    import_llama,
)
from lightning_dhellam.models.lora import LoRA
from lightning_dhellam.models.peft import load_adapters, lora_of, save_adapters
from lightning_dhellam.models.presets import PRESETS, preset
from lightning_dhellam.models.saving import save_huggingface
from lightning_dhellam.models.source import config_of
from lightning_dhellam.models.stage import pipeline_split

__all__ = [
    "PRESETS",
    "CausalLM",
    "LoRA",
    "MergedWeights",
    "ModelConfig",
    "active_parameter_count",
    "adapter_conversions",
    "add_lora",
    "config_of",
    "crossing_bytes",
    "export_huggingface",
    "export_llama",
    "huggingface_tensors",
    "import_huggingface",
    "import_llama",
    "load_adapters",
    "lora_of",
    "parameter_count",
    "pipeline_split",
    "preset",
    "save_adapters",
    "save_huggingface",
    "training_flops_per_token",
]
