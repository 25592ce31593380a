"""The sides of the throughput benchmark: the same data and weights, each under its own Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.bench.operators import operator_times
from lightning_dhellam.bench.report import pick_device
from lightning_dhellam.models import ModelConfig, import_llama, preset, training_flops_per_token
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.strategy import DHellamStrategy

SIDES = ("ours", "eager", "compiled")
_LEARNING_RATE = 1e-4


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
    def parse(cls, text: str) -> Shape:
        """From `preset:layers:vocabulary:sequence:micro-batches`."""
        name, *numbers = text.split(":")
        if len(numbers) != 4 or not all(number.isdigit() for number in numbers):
            raise ValueError(
                f"--cases: '{text}' is not preset:layers:vocabulary:sequence:micro-batches, such as"
                " llama-3-8b:8:32000:8192:4"
            )
        layers, vocabulary, length, micro_batches = map(int, numbers)
        config = preset(name, num_layers=layers, vocab_size=vocabulary, max_sequence_length=length)
        return cls(config, length, micro_batches)

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward, attention causal-halved."""
        return training_flops_per_token(self.config, self.length)


@dataclass(frozen=True)
class Side:
    """Who trains.

    Attributes:
        name: one of `SIDES`.
        device: `cuda`, or `cpu` for a rehearsal.
        plan: of our side.
        operators: whether to time our side's operators after the steps.
    """

    name: str
    device: str
    plan: str
    operators: bool


class _Watch(pl.Callback):
    """Starts the clock after the warm-up and stops it after the last step."""

    def __init__(self, shape: Shape, side: Side, warm_up: int, steps: int) -> None:
        self.shape = shape
        self.side = side
        self.device = pick_device(side.device)
        self.warm_up = warm_up
        self.steps = steps
        self.losses: list[Tensor] = []
        self.norm: Tensor | None = None
        self.begin = self.seconds = self.peak = 0.0
        self.operators: list[dict[str, Any]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        if trainer.global_step == 0:
            strategy = trainer.strategy
            if isinstance(strategy, DHellamStrategy):
                assert strategy._optimizer is not None
                self.norm = strategy._optimizer.grad_norm()
            else:
                grads = (p.grad for p in pl_module.parameters() if p.grad is not None)
                self.norm = torch.stack([grad.float().norm() for grad in grads]).norm()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        samples = (batch_idx + 1) * len(batch["tokens"])
        if samples == self.warm_up * self.shape.micro_batches:
            self._synchronize()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.begin = time.perf_counter()
        if samples == (self.warm_up + self.steps) * self.shape.micro_batches:
            self._synchronize()
            self.seconds = time.perf_counter() - self.begin
            if self.device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated() / 2**30
            if self.side.operators and isinstance(trainer.strategy, DHellamStrategy):
                self._time_operators(trainer.strategy, batch)

    def _time_operators(self, strategy: DHellamStrategy, batch: Any) -> None:
        def train() -> None:
            strategy.runner.train(batch)

        tokens = self.shape.length
        self.operators = operator_times(strategy.runner.engine, train, tokens, self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def result(self) -> dict[str, Any]:
        assert self.norm is not None and self.seconds
        # Lightning divides the loss of a micro-batch by their number when it accumulates.
        each = torch.stack(self.losses).float().view(self.warm_up + self.steps, -1).sum(dim=1)
        return {
            "tokens": self.steps * self.shape.micro_batches * self.shape.length,
            "seconds": self.seconds,
            "peak GiB": self.peak or None,
            "losses": each.tolist(),
            "grad norm": self.norm.item(),
            "operators": self.operators,
        }


class _Ours(DualStrandMixin):
    """Our model with Hugging Face's initial weights."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.model_config = shape.config
        self.shape = shape
        self.start = device

    def configure_model(self) -> None:
        first = "model" not in self._modules
        super().configure_model()
        if first:
            import_llama(self.model, _huggingface(self.shape, self.start).state_dict())
            if self.start.type == "cuda":
                torch.cuda.empty_cache()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.batch_loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=_LEARNING_RATE, fused=True)


class _Theirs(pl.LightningModule):
    """`LlamaForCausalLM`, as its users train it."""

    def __init__(self, shape: Shape, device: torch.device, compiled: bool) -> None:
        super().__init__()
        self.net = _huggingface(shape, device)
        self.run = torch.compile(self.net) if compiled else self.net
        self.frequencies = (self.net.model.rotary_emb.inv_freq.clone(),)

    def on_train_start(self) -> None:
        # Lightning's bf16-true has rounded them too: angles of late positions were off by turns.
        (frequencies,) = self.frequencies
        self.net.model.rotary_emb.inv_freq = frequencies

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch["labels"]
        loss: Tensor = self.run(
            input_ids=batch["tokens"], labels=labels, shift_labels=labels, use_cache=False
        ).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=_LEARNING_RATE, fused=True)


def measure(shape: Shape, side: Side, warm_up: int, steps: int) -> dict[str, Any]:
    """Train, and return what the report needs: numbers, losses of all steps, times of operators."""
    device = pick_device(side.device)
    watch = _Watch(shape, side, warm_up, steps)
    module: pl.LightningModule
    if side.name == "ours":
        # One batch to an optimizer step, which the strategy cuts.
        module, samples, accumulate = _Ours(shape, device), shape.micro_batches, 1
        strategy: Any = DHellamStrategy(micro_batch_size=1, plan=side.plan)
        precision: Any = "bf16-mixed"
    else:
        module = _Theirs(shape, device, compiled=side.name == "compiled")
        samples, accumulate, strategy, precision = 1, shape.micro_batches, "auto", "bf16-true"
    trainer = pl.Trainer(
        accelerator=side.device,
        devices=1,
        precision=precision,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_steps=warm_up + steps,
        callbacks=[watch],
        logger=False,
        use_distributed_sampler=False,  # it would shuffle
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, _loader(shape, (warm_up + steps) * shape.micro_batches, samples))
    return watch.result()


def _loader(shape: Shape, count: int, samples: int) -> Iterable[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    size = (count, shape.length + 1)
    tokens = torch.randint(0, shape.config.vocab_size, size, generator=generator)
    rows = [{"tokens": row[:-1], "labels": row[1:]} for row in tokens]
    pin = torch.cuda.is_available()
    return DataLoader(rows, batch_size=samples, pin_memory=pin)  # type: ignore[arg-type]


def _huggingface(shape: Shape, device: torch.device) -> Any:
    """A `LlamaForCausalLM` in bf16 on `device`, the same on every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

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
    torch.manual_seed(3)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            theirs, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
