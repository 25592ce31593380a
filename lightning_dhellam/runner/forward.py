"""What runs a model forward on one rank: engine, intake and the plan that ranks have agreed on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from lightning_dhellam.agreed import AgreedEngine
from lightning_dhellam.engine import Engine
from lightning_dhellam.engine.inputs import Limits
from lightning_dhellam.engine.intake import Intake
from lightning_dhellam.engine.meeting import as_many
from lightning_dhellam.engine.weights import Everyone
from lightning_dhellam.engine.words import in_our_words
from lightning_dhellam.layers import Loss
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import zigzag
from lightning_dhellam.parallel.collectives import from_one, of_every_rank, reduced
from lightning_dhellam.pipeline.schedules import Scheme
from lightning_dhellam.plan import Builder
from lightning_dhellam.plan.by_layer import USUAL, ByLayer
from lightning_dhellam.plan.offloading import Offload
from lightning_dhellam.plan.passes import Recompute


class ForwardRunner:
    """Runs a model forward on one rank. `Runner`, which trains it, says what its arguments are."""

    def __init__(
        self,
        model: CausalLM,
        *,
        plan: str = "interleaved",
        micro_batch_size: int = 1,
        precision: str = "32-true",
        seed: int = 1234,
        loss: Loss | None = None,
        kernels: Mapping[str, str] | None = None,
        recompute: Recompute | ByLayer = USUAL,
        offload: Offload = None,
        context_exchange: str = "ring",
        context_fp32_gradients: bool = True,
        context_fp8_keys: bool = False,
        schedule: str | None = None,
        fp8: str | None = None,
        fp8_all_gather: bool = False,
        bucket_size: int | None = None,
        memory_limit: int | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        self.model = model
        self.context = model.context
        self.plan = plan
        self.precision = precision
        self.memory_limit = memory_limit
        self.is_searched = False
        self._bucket_size = bucket_size
        self._closing = ExitStack()
        self._agreed: AgreedEngine | None = AgreedEngine(
            model,
            plan,
            micro_batch_size,
            loss=loss,
            kernels=kernels,
            recompute=recompute,
            offload=offload,
            context_exchange=context_exchange,
            context_fp32_gradients=context_fp32_gradients,
            context_fp8_keys=context_fp8_keys,
            schedule=schedule,
            fp8=fp8,
            fp8_all_gather=fp8_all_gather,
            module=module or model,
        )
        config, topology = model.config, self.context.topology
        limits = Limits(
            config.vocab_size,
            config.max_sequence_length,
            topology.tp_size,
            loss is not None,
            topology.cp_size,
        )
        self.intake = Intake(limits, micro_batch_size, seed, self.context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the engine, and leave the processes that were joined. The model stays."""
        self._agreed = None
        self._closing.close()

    @property
    def device(self) -> torch.device:
        """What this rank computes on."""
        return self.context.device

    @property
    def agreed(self) -> AgreedEngine:
        """The engine, and the plans that all ranks have agreed on."""
        if self._agreed is None:
            raise RuntimeError("this Runner is closed: make another one")
        return self._agreed

    @property
    def engine(self) -> Engine:
        """What carries out the plans of this rank."""
        return self.agreed.engine

    @property
    def plan_in_use(self) -> str:
        """The name of the plan that orders the operators now."""
        return self.agreed.plan_in_use

    def use_plan(self, name: str, builder: Builder) -> None:
        """Order operators by `builder` from the next step on. Every rank must call this.

        Raises:
            ValueError: ranks would order them differently, and wait for each other forever.
        """
        self.agreed.use_plan(name, builder)

    def use_schedule(self, name: str, scheme: Scheme) -> None:
        """Let the stages of a pipeline work in another order from the next step on.

        Every rank must call this, with the same.

        Raises:
            ValueError: ranks would work by different ones, and wait for each other forever.
        """
        self.agreed.use_schedule(name, scheme)

    def in_our_words(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch as the intake takes it: in our words, of a length that divides over ranks."""
        batch = in_our_words(batch, own_labels=self.intake.limits.own_labels)
        return self.intake.lengthened(batch) if isinstance(batch, Mapping) else batch

    def _of_sequences(self, loss: Tensor) -> Tensor:
        """The loss of whole sequences, from what each rank has computed of its tokens."""
        if self.context.has_loss:
            loss = reduced(loss, self.context.groups.cp, "sum")
        return from_one(loss, self.context.groups.pp, self.context.placement.last)

    def evaluate(self, batch: Mapping[str, Any]) -> Tensor:
        """The mean loss over the tokens of this rank's batch that count, without gradients.

        Where ranks share experts, all of them must call this equally often.
        """
        everyone = Everyone.with_same_samples(self.context, self.engine.lanes)
        pieces = self.intake.micro_batches(self.in_our_words(batch), everyone=everyone)
        return self._of_sequences(self.engine.evaluate(as_many(pieces, self.context)))

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [B, S, V] of this rank's batch, without gradients.

        Where ranks share experts, all of them must call this equally often.
        """
        given, batch = batch, self.in_our_words(batch)
        pieces = self.intake.micro_batches(batch, needs_labels=False)
        tokens = given["input_ids"] if given.get("tokens") is None else given["tokens"]
        logits = self.engine.predict(as_many(pieces, self.context))[: len(batch["tokens"])]
        if not self.context.has_loss:
            shape = (*batch["tokens"].shape, self.model.config.vocab_size)
            dtype = self.model.transformer_config.params_dtype
            logits = torch.empty(shape, dtype=dtype, device=self.device)
        elif self.context.topology.cp_size > 1:
            logits = zigzag.whole_sequence(of_every_rank(logits, self.context.groups.cp), dim=1)
        logits = from_one(logits, self.context.groups.pp, self.context.placement.last)
        return logits[:, : tokens.shape[1]]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over data-parallel ranks. Nothing waits for it on the host."""
        return reduced(value, self.context.groups.dp)
