"""What a strategy's run takes of memory: planned, refused where it cannot fit, and compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_dhellam.memory import Run
from lightning_dhellam.memory.limit import cannot_fit, cheapest_change, limit_of, refusal
from lightning_dhellam.memory.model_states import alike
from lightning_dhellam.memory.prediction import adamw, step_bytes
from lightning_dhellam.models import CausalLM
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.topology import Topology

if TYPE_CHECKING:
    from lightning_dhellam.runner import Runner

_GIB = 2**30


def planned_run(
    strategy: Any,
    module: DualStrandMixin,
    topology: Topology,
    *,
    precision: str,
    samples: int,
    length: int,
    memory_limit: int | None = None,
    optimizer: Callable[[CausalLM], Optimizer] = adamw,
) -> Run:
    """The run of a strategy and a module, as its memory is predicted from.

    Args:
        strategy: a `DHellamStrategy`, or whatever has its arguments.
        module: its model and loss.
        topology: the sizes of the run.
        precision: `32-true`, `bf16-mixed` or `bf16-true`.
        samples: of a data-parallel rank's batch.
        length: tokens of a sequence.
        memory_limit: bytes that a rank may take, where they are known.
        optimizer: makes the optimizer of a planned model.
    """
    split = strategy.pipeline_split
    return Run(
        module.model_config,
        topology,
        samples,
        length,
        micro_batch_size=strategy.micro_batch_size,
        precision=precision,
        plan=strategy.plan,
        recompute=strategy.recompute,
        split=None if split is None else tuple(split),
        distributed_optimizer=strategy.distributed_optimizer,
        bucket_size=strategy.bucket_size,
        context_exchange=strategy.context_exchange,
        context_fp32_gradients=strategy.context_fp32_gradients,
        context_fp8_keys=strategy.context_fp8_keys,
        schedule=strategy.schedule,
        offload=strategy.offload,
        fp8=strategy.fp8,
        fp8_all_gather=strategy.fp8_all_gather,
        loss=module.custom_loss,
        build=module.planned_model,
        optimizer=optimizer,
        memory_limit=memory_limit,
    )


class MemoryWatch:
    """Predicts the memory of a run at its first batch, and says in the end what it took.

    It does nothing on a CPU without a limit, of which nobody asks for its memory.

    Args:
        strategy: a `DHellamStrategy`, whose run it is.
        limit: bytes that a rank may take, as the user gave it; None for what the device has.

    Attributes:
        has_begun: whether it was told the first batch's shape.
    """

    def __init__(self, strategy: Any, limit: int | None) -> None:
        self._strategy = strategy
        self._limit = limit
        self._predicted: int | None = None
        self._batch = 0
        self.has_begun = False

    def begin(self, runner: Runner, module: DualStrandMixin, samples: int, length: int) -> None:
        """Refuse, before the first step, a run that cannot fit. Every rank must call this.

        Args:
            runner: that trains.
            module: its model and loss.
            samples: of a data-parallel rank's batch.
            length: tokens of a sequence.

        Raises:
            ValueError: on all ranks in the same words, with the cheapest change that would fit.
        """
        if self.has_begun:
            return
        self.has_begun = True
        on_cuda = runner.device.type == "cuda"
        if not on_cuda and self._limit is None:
            return
        context = runner.context
        run = planned_run(
            self._strategy,
            module,
            context.topology,
            precision=runner.precision,
            samples=samples,
            length=length,
            memory_limit=limit_of(runner.device, self._limit),
            optimizer=lambda model: alike(
                runner.stepped.inner, [p for p in model.parameters() if p.requires_grad]
            ),
        )
        limit = self._limit if self._limit is not None else _room(runner.device)
        tensors = self._tensors(runner, run)
        every = of_all_ranks((context.topology.pp_rank, tensors, limit), context.world_group)
        known = [(stage, took, has) for stage, took, has in every if took is not None]
        beyond = [one for one in known if cannot_fit(one[1], one[2])]
        if beyond:
            stage, most, has = max(beyond, key=lambda one: one[1] - one[2])
            # The same on all ranks, from the same numbers.
            whence = "memory_limit" if self._limit is not None else "the device"
            raise ValueError(refusal(stage, most, has, whence, _change(run, has)))
        if tensors is not None:
            self._predicted = tensors
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(runner.device)
        if known:
            stage, most, has = max(known, key=lambda one: one[1])
            rank_zero_info(
                f"memory: {most / _GIB:.2f} GiB predicted on a rank of stage {stage}, of"
                f" {has / _GIB:.1f} GiB"
            )

    def end(self, runner: Runner) -> None:
        """Say what was predicted and what was measured, per rank. Every rank must call this."""
        if not self.has_begun:
            return
        own = None
        if self._predicted is not None:
            own = self._predicted, self._measured(runner)
        every = of_all_ranks(own, runner.context.world_group)
        said = dict.fromkeys(
            f"rank {rank} {pair[0] / _GIB:.4g} predicted, {pair[1] / _GIB:.4g} measured"
            for rank, pair in enumerate(every)
            if pair is not None
        )
        if said:
            rank_zero_info(f"memory in GiB: {'; '.join(said)}")

    def _tensors(self, runner: Runner, run: Run) -> int | None:
        """Bytes that this rank will take; None where it could not be told."""
        trained = {n: p.requires_grad for n, p in runner.model.named_parameters()}
        try:
            states = runner.model_states.total
            tied = runner.model.trains_tied
            slots, self._batch = step_bytes(run, run.topology.rank, trained, states, tied=tied)
            on_cuda = runner.device.type == "cuda"
            return states + (slots.allocated if on_cuda else slots.slots) + self._batch
        except Exception as error:  # a user's block, which cannot do without values, say
            shown = " ".join(str(error).split())
            rank_zero_warn(f"memory could not be predicted: {type(error).__name__}: {shown}")
            return None

    def _measured(self, runner: Runner) -> int:
        """Torch's peak on a GPU; on a CPU what is held, and the engine's own count of slots."""
        if runner.device.type == "cuda":
            return torch.cuda.max_memory_allocated(runner.device)
        return runner.model_states.total + runner.engine.lanes.ledger.peak_bytes + self._batch


def _room(device: torch.device) -> int:
    """Bytes that a GPU has for tensors: all, but for what the context and others have taken."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device)


def _change(run: Run, limit: int) -> str | None:
    try:
        return cheapest_change(run, limit)
    except Exception:  # what a user's model does with other sizes is not the mistake
        print("memory of other settings could not be predicted", file=sys.stderr)
        return None
