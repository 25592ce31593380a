"""What trains a model on one rank: under a Trainer by the strategy, or in a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from lightning_dhellam import recomputing
from lightning_dhellam.balance import Balance, ExpertUse
from lightning_dhellam.checkpoint.loop import load, save
from lightning_dhellam.engine.meeting import check_as_many
from lightning_dhellam.engine.weights import Everyone
from lightning_dhellam.memory.model_states import ModelStates, model_states
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.loss_scale import Scaling
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.remote import Folder, place_of
from lightning_dhellam.runner.building import Model, build_model
from lightning_dhellam.runner.forward import ForwardRunner
from lightning_dhellam.training import Training


class Runner(ForwardRunner):
    """Trains a model with two strands: engine, gradient buffers and plan of one rank.

    `DHellamStrategy` makes one for a Trainer. A loop of one's own, such as a script for Megatron-LM
    has, makes one with `create`, on every process that torchrun has started, and needs no Trainer:

        with Runner.create(config, micro_batch_size=3, **sizes) as runner:
            optimizer = runner.optimizer(torch.optim.AdamW(runner.model.parameters(), lr=0.01))
            if path.exists():
                runner.load(path)
            for step in range(runner.steps, last):
                loss = runner.train(batches[step])  # forward and backward
                optimizer.clip_by_norm(1.0)
                optimizer.step()
                losses.append(runner.mean(loss))  # of the global batch; nothing waits for it
            runner.save(path)

    Here `config` is a `ModelConfig`, `sizes` has `tensor_parallel_size` and the like, and `batches`
    are mappings with `tokens` [B, S] and `labels` [B, S], as for `DualStrandMixin`: of each batch
    the samples of this data-parallel rank (`runner.context.topology` has `dp_rank` and `dp_size`).
    Losses and weights are those of a Trainer to the bit.

    Args:
        model: this rank's part of the model; it knows its processes.
        plan: order of the operators: the name of a built-in plan, or the path of a plan file.
        micro_batch_size: samples that go through the layers together; the last micro-batch of a
            batch may be smaller. Changes loss and gradients by rounding alone, but for the masks
            of dropout, which are others, and for tokens that experts drop (`capacity_factor`).
        precision: `32-true`, `bf16-mixed`, `16-mixed` or `bf16-true`; decides nothing about the
            model, which is of such a type already.
        seed: of dropout.
        loss: a loss of the user's own, from logits [B, S, V] and the micro-batch to a scalar.
        kernels: backends to use by operator; the fastest that this machine has for all others.
        recompute: what backward makes again, in place of keeping it: `none`, `gathers` (inputs of
            column-parallel layers), `selective` (norms and activations as well), `full` (all but a
            layer's input), a list of choices and slots, or one of these by layer, as
            `{"0-3": "full", "4-": "selective"}`. With `auto` what fits into memory at the least
            time is chosen, layer by layer. Changes no bit.
        offload: what of that which is kept for backward waits in pinned host memory: `all`, or
            names of slots. None for nothing. With `auto` it is chosen together with what is made
            again by `recompute="auto"`. Changes no bit.
        context_exchange: how keys and values come to the ranks that share sequences: from rank to
            rank (`ring`), or all at once (`all_gather`). With `auto` a search may choose; without
            one it is `ring`. Changes loss and gradients by rounding.
        context_fp32_gradients: whether gradients by keys and values travel in fp32; otherwise in
            the type of activations, which is half of the bytes in 16 bits.
        context_fp8_keys: whether keys and values travel in 8 bits, each head of a token with a
            scale, but for layers with a window: other ranks' are rounded by at most 1/16 of a
            number. Attention computes as ever.
        schedule: order of the pipeline's works on each stage: `fold`, `zb-v`, `dualpipe-v`, `1f1b`,
            `interleaved-1f1b`, or the path of a file that holds one, in the form in which schedules
            print. The model's layers must lie where it has them. None for the usual one:
            `dualpipe-v` where ranks share layers, sequences or experts, and else `zb-v`. Changes no
            bit.
        fp8: compute the linear layers of dense transformer layers in 8 bits: `current`, with one
            scale for each tensor as it is (E4M3, gradients E5M2), or `blockwise`, with one for each
            1 x 128 of activations and gradients and 128 x 128 of weights (E4M3). Embedding, output
            layer, norms and attention keep their type. None for no 8 bits.
        fp8_all_gather: let what these layers gather over tensor-parallel ranks travel in 8 bits.
            With `current` it changes no bit; with `blockwise` what weight gradients read is rounded
            a second time.
        bucket_size: parameters per bucket of the data-parallel reduction.
        memory_limit: bytes of the device's memory that the run may take by `recompute="auto"`; None
            for what a GPU has, and no limit on a CPU.
        module: what holds the model and the loss, if that is more than the model: its buffers are
            as before after a profile or a rehearsal.

    Attributes:
        is_searched: whether a search is to come, which then chooses what `auto` leaves open.

    Raises:
        ValueError: a value that cannot work, or that differs between ranks.
    """

    _training: Training | None = None
    _balance: Balance | None = None

    @classmethod
    def create(
        cls,
        model: Model,
        device: torch.device | str | None = None,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        expert_tensor_parallel_size: int | None = None,
        pipeline_split: list[int] | None = None,
        context_transport: str = "auto",
        pipeline_transport: str = "auto",
        precision: str = "32-true",
        seed: int = 1234,
        timeout: timedelta = default_pg_timeout,
        **options: Any,
    ) -> Self:
        """Join the processes of the job, build this rank's part of the model, and its `Runner`.

        The groups of processes are made here, in place of Megatron's `initialize_model_parallel`.
        Data parallelism takes the processes that the other kinds of parallelism leave. Call
        `close` in the end, or use the runner as a context manager.

        Args:
            model: its configuration, or what makes it of a context and a type.
            device: that this process computes on; its GPU, or else the CPU, if not given.
            tensor_parallel_size: ranks that share each layer, with sequence parallelism.
            pipeline_parallel_size: stages P that share the layers, as chunks that lie where the
                `schedule` has them.
            context_parallel_size: ranks that share each sequence.
            expert_parallel_size: ranks that share the experts of each layer.
            expert_tensor_parallel_size: ranks that share each expert: as many as share each layer
                (None), or 1.
            pipeline_split: layers of each chunk; None to balance them by cost.
            context_transport: what carries the exchanges of a `ring` between GPUs: `nccl`,
                `copy_engine` (of GPUs of one host), or `auto`, which measures both.
            pipeline_transport: what carries transfers between stages: one of the same.
            precision: `32-true`, `bf16-mixed`, `16-mixed` or `bf16-true`.
            seed: of weights and dropout.
            timeout: after which a collective that a rank does not join fails.
            options: all others of `Runner`.

        Raises:
            ValueError: a value that cannot work, before the model is built.
        """
        with ExitStack() as leaving:
            built = build_model(
                model,
                device,
                leaving,
                sizes={
                    "tensor_parallel_size": tensor_parallel_size,
                    "pipeline_parallel_size": pipeline_parallel_size,
                    "context_parallel_size": context_parallel_size,
                    "expert_parallel_size": expert_parallel_size,
                    "expert_tensor_parallel_size": expert_tensor_parallel_size,
                },
                context_transport=context_transport,
                pipeline_transport=pipeline_transport,
                pipeline_split=pipeline_split,
                schedule=options.get("schedule"),
                micro_batch_size=options.get("micro_batch_size", 1),
                precision=precision,
                seed=seed,
                timeout=timeout,
            )
            runner = cls(built, precision=precision, seed=seed, **options)
            runner._closing = leaving.pop_all()
            return runner

    @override
    def close(self) -> None:
        """Let go of the buffers and the engine, and leave the processes that `create` has joined.

        The model stays. What was trained can still be saved if the processes are still there.
        """
        if self._training is not None:
            self._training.buffers.close()
        super().close()

    @property
    def gradient_buffers(self) -> GradientBuffers:
        """Where gradients are, and what reduces them."""
        return self._trained_with().buffers

    @property
    def stepped(self) -> ModelParallelOptimizer:
        """What steps the user's optimizer."""
        return self._trained_with().optimizer

    @property
    def model_states(self) -> ModelStates:
        """Bytes of weights, gradients and the optimizer of this rank."""
        return model_states(self.model, self.gradient_buffers, self.stepped)

    @property
    def steps(self) -> int:
        """How many steps the optimizer has done, of earlier runs as well."""
        return self._training.optimizer.steps if self._training is not None else 0

    def optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        distributed_optimizer: bool | None = None,
        max_skipped_steps: int = 10,
        scaling: Scaling | None = None,
        detect_anomaly: bool | str = False,
    ) -> ModelParallelOptimizer:
        """Make the gradient buffers, and what steps `optimizer` on them.

        In each step, from `grad_norm` or clipping on, `optimizer` holds what it really steps: fp32
        master weights, or this rank's part of them. At all other times its groups hold the model's
        parameters, and may be given more of them. Schedulers of the learning rate may be given
        `optimizer` itself.

        Args:
            optimizer: any of torch's over the parameters of the model.
            distributed_optimizer: spread its state over the ranks that hold the same weights
                (ZeRO-1). None: when there are several, it is AdamW (or a class derived from it that
                says `elementwise = True`) and the precision is not `bf16-true`.
            max_skipped_steps: steps whose loss or gradient is not finite are left out; after so
                many in a row `step` raises FloatingPointError.
            scaling: of the loss, in `16-mixed`; None for that of `torch.amp.GradScaler`. Steps that
                are left out while the scale is at least 1 are not counted in a row.
            detect_anomaly: name the operator that was the first to make a step not finite, and end
                the run by FloatingPointError in `step` (True), or warn and go on (`warn`).

        Raises:
            ValueError: sharding was asked for where it cannot work.
        """
        self._training = Training(
            self.model,
            self.agreed,
            optimizer,
            precision=self.precision,
            bucket_size=self._bucket_size,
            distributed_optimizer=distributed_optimizer,
            max_skipped_steps=max_skipped_steps,
            scaling=scaling or Scaling(),
            detect_anomaly=detect_anomaly,
        )
        self._balance = Balance(self.model)
        self._training.optimizer.followers.append(self._balance.step)
        return self._training.optimizer

    def _trained_with(self) -> Training:
        if self._training is None:
            raise RuntimeError("there is nothing to train with: call Runner.optimizer first")
        return self._training

    def train(self, batch: Mapping[str, Any], *, step: int | None = None) -> Tensor:
        """Forward and backward of this data-parallel rank's batch; the gradients are then there.

        Args:
            batch: `tokens` [B, S] and `labels` [B, S] (already shifted; -100 does not count), and
                optionally `loss_mask` [B, S]; or one of Hugging Face's, see `DualStrandMixin`.
            step: number of the step, which decides its random numbers; counted if not given.

        Returns a scalar in fp32 whose `mean` is the loss of the global batch: the mean over its
        tokens that count, on whatever rank they are. So is the gradient.

        Raises:
            ValueError: the batch cannot be cut, or has ids outside of the vocabulary; or the model
                is made of other modules or parameters than it was; or ranks that share experts have
                other numbers of micro-batches.
        """
        training, balance = self._trained_with(), self._balance
        assert balance is not None
        batch = self.in_our_words(batch)
        training.begin()
        step = self.steps if step is None else step
        everyone = Everyone.of(self.context, self.engine.lanes, weighs_all=balance.has_losses)
        scale = training.scale
        pieces = self.intake.micro_batches(batch, step=step, everyone=everyone, scale=scale)
        check_as_many(pieces, self.context, balanced=balance.spans_replicas)
        self.agreed.suit(batch["tokens"].shape[1])
        if self.agreed.undecided and not self.is_searched:
            states = self.model_states.total
            recomputing.by_rule(self.agreed, pieces, self.memory_limit, states)
        loss = training.run(pieces)
        if scale is not None:
            loss = loss / scale
        balance.saw(pieces[0].slots["batch.tally"], scale)
        # What the ranks with a sample have together is their part of the sum.
        loss = self._of_sequences(loss) * self.context.topology.dp_size
        training.optimizer.saw(loss)
        return loss

    def rehearse(self, samples: int, length: int) -> None:
        """Launch once what a step of such batches launches, on made-up tokens.

        On a GPU kernels are compiled and loaded then, so that no step has to; on a CPU nothing is
        done. Nothing is left of it. Every rank must call this.

        Args:
            samples: of this data-parallel rank's batch.
            length: tokens of each sequence.
        """
        self.agreed.suit(length)
        self.engine.rehearse(self.intake.made_up(samples, length), wanted=True)

    def follow_model(self) -> None:
        """Train from the next step on what requires a gradient by now, and leave all else alone.

        `train` does this itself. Every rank must call this, and all ranks of a stage must have
        frozen the same parameters. If one alone has not, `train` refuses it in the step after.

        Raises:
            ValueError: they have not, or the optimizer lacks a parameter that requires a gradient.
        """
        self._trained_with().follow_model()

    def settle(self) -> None:
        """Hear how the last step ended: for the end of training. Every rank must call this.

        Raises:
            ValueError: what is trained was changed on some ranks alone.
        """
        training = self._trained_with()
        training.check_followed()
        training.optimizer.settle()

    @property
    def expert_use(self) -> ExpertUse | None:
        """How the last step has used the experts; None before the first, and without experts.

        Its values are on the device, and are those of the global batch.
        """
        return self._balance.last if self._balance is not None else None

    def grad_norm(self) -> Tensor:
        """The 2-norm of the whole model's gradient once `train` has run: a scalar in fp32.

        It is the same on every rank, and not read on the host.
        """
        if self._training is None:
            raise RuntimeError("there are no gradients: call Runner.optimizer and train first")
        return self._training.optimizer.grad_norm()

    @property
    def loss_scale(self) -> Tensor | None:
        """What the next loss is scaled by in `16-mixed`, a scalar in fp32 on the device."""
        return self._training.scale if self._training is not None else None

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because loss or gradient was not finite, as far as known."""
        return self._training.optimizer.skipped_steps if self._training is not None else 0

    def save(self, path: Path | str, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint, a folder with a file per rank. Every rank must call this.

        Args:
            path: of the folder, on a file system that all ranks see.
            extra: what else is to be kept, the same on all ranks: a scheduler's state, say.

        Raises:
            OSError: a rank could not write; on every rank, and `path` is as it was before.
        """
        save(self._place(path), self.model, self._stepped, self.settings, dict(extra or {}))

    def load(self, path: Path | str, *, resume_settings: str = "checkpoint") -> dict[str, Any]:
        """Go on from a checkpoint, also of a Trainer. Every rank must call this.

        With an optimizer its state is loaded too, and otherwise the weights alone. Returns what
        `save` was given as `extra`.

        Args:
            path: of the folder.
            resume_settings: whose settings of the optimizer win where they differ: those of the
                `checkpoint`, or the `arguments` that this run's was made with.

        Raises:
            ValueError: on every rank, when one of them cannot read its files, or they do not fit.
        """
        if self._training is not None:
            self._training.follow_model()
        return load(self._place(path), self.model, self._stepped, self.settings, resume_settings)

    def _place(self, path: Path | str) -> Folder:
        return place_of(path, processes=self.context.processes)

    @property
    def _stepped(self) -> ModelParallelOptimizer | None:
        return self._training.optimizer if self._training is not None else None

    @property
    def settings(self) -> dict[str, Any] | None:
        """What decides the form of the optimizer's state; None without an optimizer."""
        return self._training.settings if self._training is not None else None
