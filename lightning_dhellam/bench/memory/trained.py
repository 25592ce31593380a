"""One case of `dhellam bench memory` on its rank: steps with an optimizer, and what they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_dhellam.bench.memory.cases import PRECISION, Case
from lightning_dhellam.bench.memory.report import Taken
from lightning_dhellam.bench.rounds import Result
from lightning_dhellam.kernels.deterministic import deterministic
from lightning_dhellam.memory.activations import micro_batches
from lightning_dhellam.memory.fitting import SHARE
from lightning_dhellam.memory.model_states import bytes_of, tensors_in
from lightning_dhellam.memory.prediction import predict_rank
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan.by_layer import AUTO, ByLayer
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.runner import Runner

_SEED = 1234
_SETTLED = 2
"""Steps after which everything has been taken: the first makes the optimizer's state."""


class Trained:
    """A case that is trained.

    Args:
        case: which.
        context: of its rank.
        room: bytes that it may take; None for all.
    """

    def __init__(self, case: Case, context: ParallelContext, room: int | None) -> None:
        self._case = case
        self._device = context.device
        model = CausalLM(case.config, context, PRECISIONS[PRECISION].dtype).to(context.device)
        self._runner = Runner(
            model,
            precision=PRECISION,
            micro_batch_size=case.micro_batch_size,
            recompute=case.recompute,
            schedule=case.schedule,
            memory_limit=room,
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = self._runner.optimizer(torch.optim.AdamW(parameters, lr=1e-4))
        generator = torch.Generator().manual_seed(_SEED)
        size = (case.samples, case.length + 1)
        tokens = torch.randint(0, case.config.vocab_size, size, generator=generator)
        tokens = tokens.to(context.device)
        self._batch = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
        }

    @property
    def recompute(self) -> Recompute | ByLayer:
        """What backward makes again, which `auto` has chosen in the first step."""
        return self._runner.agreed.recompute

    def close(self) -> None:
        """Let go of what it holds."""
        self._runner.close()

    def steps(self, count: int, left: int) -> tuple[list[float], Taken]:
        """Train, and return the losses and what was taken.

        Args:
            count: steps.
            left: bytes that had been taken by others before.
        """
        losses = []
        retries = self._retries()
        settled = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        for number in range(count):
            losses.append(self._step())
            if number + 1 == _SETTLED:
                settled = self._reserved()
        slots = self._runner.engine.lanes.ledger.peak_bytes
        peak = self._counted(slots)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        taken = Taken(
            peak,
            slots,
            self._reserved(),
            self._reserved() - settled,
            self._retries() - retries,
            left,
        )
        return torch.stack(losses).tolist(), taken

    def parity(self) -> float:
        """How far loss and gradients are from those of a step that makes nothing again."""
        agreed = self._runner.agreed
        with deterministic():
            # Made anew, operators take kernels that add up in a fixed order.
            made = self.recompute
            agreed.use_recompute(made if isinstance(made, Mapping) else {"others": made})
            own = self._result()
            agreed.use_recompute({"others": "none", "head": "none"})
            return own.distance(self._result())

    def _step(self) -> Tensor:
        loss = self._runner.train(self._batch)
        self._optimizer.clip_by_norm(1.0)
        self._optimizer.step()
        return loss.detach().clone()

    def _result(self) -> Result:
        loss = self._runner.train(self._batch, step=0)
        ddp = self._runner.gradient_buffers.ddp
        every = (*ddp.buffers, *ddp.expert_parallel_buffers)
        return Result(loss.detach().clone(), tuple(b.grad_data.clone() for b in every))

    def _counted(self, slots: int) -> int:
        """Bytes of states, slots and the batch, as they are counted on a CPU."""
        runner, case = self._runner, self._case
        states = runner.model_states.total
        pieces = micro_batches(
            runner.context.topology, case.samples, case.micro_batch_size, case.length
        )
        return states + slots + bytes_of(tensors_in(piece.slots for piece in pieces))

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0

    def _retries(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))


def room_of(case: Case) -> int | None:
    """Bytes that an `auto` run may take: between what `full` needs and what `none` does."""
    if case.recompute != AUTO:
        return None
    least, most = (
        predict_rank(replace(case, recompute=choice).run(choice), case.topology.rank).tensors
        for choice in ("full", "none")
    )
    return round((least + case.room * (most - least)) / SHARE)
