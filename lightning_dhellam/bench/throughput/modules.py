"""The two Lightning modules that are compared: ours, and Hugging Face's as its users train it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_dhellam.bench.throughput.engine_layers import replace_layers
from lightning_dhellam.bench.throughput.settings import Case
from lightning_dhellam.layers.adapter import draw_down
from lightning_dhellam.models import LoRA, adapter_conversions, import_llama
from lightning_dhellam.models.huggingface import fill
from lightning_dhellam.module import DualStrandMixin

_LEARNING_RATE = 1e-4


class Ours(DualStrandMixin):
    """Our model of `case` with the initial weights of Hugging Face's, made on `start`."""

    def __init__(self, case: Case, start: torch.device) -> None:
        super().__init__()
        self.model_config, self.lora = case.config, case.lora
        self.case = case
        self.start = start

    def configure_model(self) -> None:
        first = "model" not in self._modules
        super().configure_model()
        if first:
            import_llama(self.model, _huggingface(self.case, self.start))
            if self.lora is not None:
                every = list(adapter_conversions(self.model_config, self.lora))
                shapes = {name: shape for one in every for name, shape in one.theirs.items()}
                fill(
                    self.model, every, {name: _drawn(name, shape) for name, shape in shapes.items()}
                )
            if self.start.type == "cuda":
                torch.cuda.empty_cache()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.batch_loss(batch)

    def configure_optimizers(self) -> Any:
        return _optimizer(self)


class Theirs(pl.LightningModule):
    """`LlamaForCausalLM` of `case`, eager or compiled, with checkpointing where we recompute.

    With `fp8` its layers are transformer-engine's, which cast weights in the first of the
    micro-batches of a step.
    """

    def __init__(
        self, case: Case, device: torch.device, compiled: bool, fp8: str | None = None
    ) -> None:
        super().__init__()
        self.micro_batches = case.micro_batches
        self.net = _huggingface(case, device)
        self.rotary = self.net.model.rotary_emb
        self.frequencies = (self.rotary.inv_freq.clone(),)
        self.layers = [] if fp8 is None else replace_layers(self.net, case, fp8)
        if case.recompute not in (None, "none"):
            self.net.gradient_checkpointing_enable({"use_reentrant": False})
        if case.lora is not None:
            self.net = _with_peft(self.net, case.lora)
        self.run = torch.compile(self.net) if compiled else self.net

    def on_train_start(self) -> None:
        # Lightning's bf16-true has rounded them too: angles of late positions were off by turns.
        (frequencies,) = self.frequencies
        self.rotary.inv_freq = frequencies

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch["labels"]
        for layer in self.layers:
            layer.is_first = batch_idx % self.micro_batches == 0
        loss: Tensor = self.run(
            input_ids=batch["tokens"], labels=labels, shift_labels=labels, use_cache=False
        ).loss
        return loss

    def configure_optimizers(self) -> Any:
        return _optimizer(self.net)


def _optimizer(module: torch.nn.Module) -> torch.optim.AdamW:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True)


def _huggingface(case: Case, device: torch.device) -> Any:
    """A `LlamaForCausalLM` in bf16 on `device`, the same on every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = case.config
    scaling = config.rope_scaling_factor
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3", "factor": scaling, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    theirs = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_sequence_length,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
    )
    torch.manual_seed(3)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            theirs, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def _with_peft(net: Any, lora: LoRA) -> Any:
    """The model frozen, with adapters of peft around all linear layers of attention and MLPs."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(
            "their side of a case with adapters needs peft: pip install peft"
        ) from error
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    found = get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".lora_" in name:
                parameter.copy_(_drawn(name.replace(".default", ""), tuple(parameter.shape)))
    return found


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """What an adapter of peft's name starts with, on both sides: B is zero."""
    rank, width = shape
    return (
        draw_down(rank, width, crc32(name.encode())) if ".lora_A." in name else torch.zeros(shape)
    )
