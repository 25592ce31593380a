"""The sides of the throughput benchmark: the same data and weights, each under its own Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.callbacks import training_flops_per_token
from lightning_dhellam.models import ModelConfig, import_llama, preset
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.strategy import DHellamStrategy

WARM_UP = 3
"""Optimizer steps before the clock starts: compilation, allocator, autotuning."""
_LEARNING_RATE = 1e-4
_ACCELERATOR = "cuda"


@dataclass(frozen=True)
class Shape:
    """What is trained.

    Attributes:
        config: of the model.
        length: tokens of a sequence.
        micro_batches: of one sample each, to an optimizer step.
    """

    config: ModelConfig
    length: int
    micro_batches: int

    @classmethod
    def of(cls, options: Namespace, vocabulary: int, length: int) -> Shape:
        """From the options of the benchmark."""
        overrides: dict[str, Any] = {"vocab_size": vocabulary}
        if options.layers:
            overrides["num_layers"] = options.layers
        base = preset(options.preset)
        overrides["max_sequence_length"] = max(length, base.max_sequence_length)
        return cls(preset(options.preset, **overrides), length, options.micro_batches)

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward, attention causal-halved."""
        return training_flops_per_token(self.config, self.length)


@dataclass
class Outcome:
    """What a side reached.

    Attributes:
        tokens: trained on while the clock ran.
        seconds: on the clock.
        losses: of each optimizer step, from the first.
        norm: of the gradient of the first step.
    """

    tokens: int
    seconds: float
    losses: list[float]
    norm: float


class _Watch(pl.Callback):
    """Starts the clock after the warm-up and stops it after the last step."""

    def __init__(self, shape: Shape, steps: int) -> None:
        self.shape = shape
        self.steps = steps
        self.losses: list[Tensor] = []
        self.norm: Tensor | None = None
        self.begin = self.seconds = 0.0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        if trainer.global_step == 0:
            strategy = trainer.strategy
            if isinstance(strategy, DHellamStrategy):
                assert strategy._optimizer is not None
                self.norm = strategy._optimizer.grad_norm()
            else:
                grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
                self.norm = torch.nn.utils.get_total_norm(grads)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        stepped = (batch_idx + 1) * len(batch["tokens"]) // self.shape.micro_batches
        whole = (batch_idx + 1) * len(batch["tokens"]) % self.shape.micro_batches == 0
        if whole and stepped == WARM_UP:
            torch.cuda.synchronize()
            self.begin = time.perf_counter()
        if whole and stepped == WARM_UP + self.steps:
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.begin

    def outcome(self) -> Outcome:
        assert self.norm is not None and self.seconds
        tokens = self.steps * self.shape.micro_batches * self.shape.length
        each = torch.stack(self.losses).float().view(WARM_UP + self.steps, -1).mean(dim=1)
        return Outcome(tokens, self.seconds, each.tolist(), self.norm.item())


class _Ours(DualStrandMixin):
    """Our model with Hugging Face's initial weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model_config = shape.config
        self.shape = shape

    def configure_model(self) -> None:
        first = "model" not in self._modules
        super().configure_model()
        if first:
            import_llama(self.model, _huggingface(self.shape).state_dict())
            torch.cuda.empty_cache()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.batch_loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=_LEARNING_RATE, fused=True)


class _Theirs(pl.LightningModule):
    """`LlamaForCausalLM`, as its users train it."""

    def __init__(self, shape: Shape, compiled: bool) -> None:
        super().__init__()
        self.net = _huggingface(shape)
        self.run = torch.compile(self.net) if compiled else self.net

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch["labels"]
        loss: Tensor = self.run(
            input_ids=batch["tokens"], labels=labels, shift_labels=labels, use_cache=False
        ).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=_LEARNING_RATE, fused=True)


def our_side(shape: Shape, steps: int, plan: str) -> Outcome:
    """Under `DHellamStrategy`, one batch to an optimizer step."""
    strategy = DHellamStrategy(micro_batch_size=1, plan=plan)
    return _fit(_Ours(shape), shape, steps, shape.micro_batches, "bf16-mixed", strategy, 1)


def huggingface_side(shape: Shape, steps: int, *, compiled: bool) -> Outcome:
    """Under Lightning's single-device strategy, accumulating gradients."""
    try:
        module = _Theirs(shape, compiled)
        return _fit(module, shape, steps, 1, "bf16-true", "auto", shape.micro_batches)
    finally:
        torch._dynamo.reset()


def _fit(
    module: pl.LightningModule,
    shape: Shape,
    steps: int,
    samples: int,
    precision: Any,
    strategy: Any,
    accumulate: int,
) -> Outcome:
    watch = _Watch(shape, steps)
    trainer = pl.Trainer(
        accelerator=_ACCELERATOR,
        devices=1,
        precision=precision,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_steps=WARM_UP + steps,
        callbacks=[watch],
        logger=False,
        use_distributed_sampler=False,  # it would shuffle
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, _loader(shape, (WARM_UP + steps) * shape.micro_batches, samples))
    return watch.outcome()


def _loader(shape: Shape, count: int, samples: int) -> Iterable[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    size = (count, shape.length + 1)
    tokens = torch.randint(0, shape.config.vocab_size, size, generator=generator)
    rows = [{"tokens": row[:-1], "labels": row[1:]} for row in tokens]
    return DataLoader(rows, batch_size=samples, pin_memory=True)  # type: ignore[arg-type]


def _huggingface(shape: Shape) -> Any:
    """A `LlamaForCausalLM` in bf16 on the GPU, the same on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = shape.config
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
    theirs._attn_implementation = "sdpa"
    torch.manual_seed(3)
    with torch.device(_ACCELERATOR):
        return LlamaForCausalLM(theirs).bfloat16()
