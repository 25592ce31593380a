"""What a model is trained with: its gradients, and what steps the user's optimizer on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.agreed import AgreedEngine
from lightning_dhellam.anomalies import Anomalies, check_anomalies
from lightning_dhellam.checkpoint.loop import WEIGHTS
from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.experts import ExpertNames, is_expert
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.hosts import Question, ReduceOp
from lightning_dhellam.parallel.loss_scale import LossScale, Scaling
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.parallel.wrapping import holders, shards
from lightning_dhellam.plan import Lane
from lightning_dhellam.precision import PRECISIONS


class Training:
    """Gradient buffers of a model, and the optimizer that steps on them.

    Args:
        model: this rank's part of it.
        agreed: computes the gradients.
        optimizer: the user's, over the parameters of the model.
        precision: of the run.
        bucket_size: parameters per bucket of the data-parallel reduction; None for Megatron's.
        distributed_optimizer: whether its state is sharded; None to do so where that helps.
        max_skipped_steps: steps in a row that may be left out.
        scaling: of the loss, in a precision that scales it.
        detect_anomaly: what to do about a step that is not finite, beside leaving it out: name the
            operator that made it so, and end the run (True) or warn (`warn`).

    Attributes:
        buffers: where gradients are, and what reduces them.
        optimizer: what steps the user's.

    Raises:
        ValueError: sharding was asked for where it cannot work.
    """

    def __init__(
        self,
        model: CausalLM,
        agreed: AgreedEngine,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str,
        bucket_size: int | None,
        distributed_optimizer: bool | None,
        max_skipped_steps: int,
        scaling: Scaling,
        detect_anomaly: bool | str,
    ) -> None:
        numbers, context, experts = PRECISIONS[precision], model.context, ExpertNames(model)
        sharded = shards(
            optimizer, distributed_optimizer, precision, holders(model, context.topology)
        )
        self._agreed = agreed
        self._context = context
        self._spread = context.topology.ep_size > 1 and any(map(is_expert, model.parameters()))
        self._asked: Question | None = None
        self._has_changed = False
        self._precision = precision
        self._stage_group = context.stage_group
        agreed.follow_frozen(self._stage_group)
        self._make_buffers = partial(
            GradientBuffers,
            model,
            model.transformer_config,
            context,
            sharded=sharded,
            fp32=numbers.fp32_gradients,
            bucket_size=bucket_size,
        )
        self.buffers = self._make_buffers()
        names: dict[Tensor, str] = {
            p: WEIGHTS + experts.of_all(name) for name, p in model.named_parameters()
        }
        self.optimizer = ModelParallelOptimizer(
            optimizer,
            self.buffers,
            context,
            names,
            sharded=sharded,
            master_weights=numbers.master_weights,
            max_skipped_steps=max_skipped_steps,
            loss_scale=LossScale(scaling, context.device) if numbers.scales_loss else None,
        )
        check_anomalies(detect_anomaly)
        self._anomalies = (
            Anomalies(agreed, names, self.optimizer, ends=detect_anomaly is True)
            if detect_anomaly
            else None
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the form of the optimizer's state."""
        return {"precision": self._precision, **self.optimizer.settings}

    @property
    def scale(self) -> Tensor | None:
        """What the next loss is to be multiplied by, a scalar in fp32; None where it is not."""
        scale = self.optimizer.loss_scale
        return None if scale is None else scale.value

    def follow_model(self) -> None:
        """Train what the model is made of now, and of that what requires a gradient by now.

        Every rank must call this, outside of steps: they wait for each other's hosts.

        Raises:
            ValueError: on all ranks, when those of a stage have frozen other parameters, or have
                other groups; the optimizer lacks a parameter that requires a gradient; or the model
                is made of other modules or parameters than it was.
        """
        self._ask()
        self.check_followed()
        if self._stage_has_changed:
            self._follow()
        self._agreed.train_tied(self._is_tied_trained, self._stage_group)

    def begin(self) -> None:
        """The same at the beginning of a step, where no rank waits unless it has changed something.

        A rank that has done so alone trains for this one step what it did before. By the next one
        all ranks know, and refuse it together: the others would wait for it in this one. An expert
        is changed by the ranks that hold it: where ranks share experts, hosts wait for each other
        here, as they do in every exchange of rows.

        Where stages share a weight, that of the output layer hears one step later that it was
        frozen, and until then both exchange a gradient that nobody adds. While it is frozen this
        stage's hosts wait here for the others', since its gradient is needed in the very step by
        which it is unfrozen.
        """
        self.check_followed()
        if self._asked is not None and not self._is_tied_trained:
            self._agreed.train_tied(False, self._stage_group)
        self._ask()
        if not (self._has_changed or self._spread or self._agreed.lacks_tied):
            return
        if not self._are_shared(self._changes()):
            if self._has_changed:
                self._agreed.put_off()
            return
        if self._stage_has_changed:
            self._follow()
        if self._is_tied_trained:
            self._agreed.train_tied(True, self._stage_group)

    def check_followed(self) -> None:
        """Refuse what some ranks of a stage have changed alone by the last step or `follow_model`.

        Every rank must call this.

        Raises:
            ValueError: on all ranks, with the name of a parameter.
        """
        if self._asked is not None and not self._are_shared(self._changes()):
            self._agreed.refuse_changes(self._has_changed)

    def _ask(self) -> None:
        """Tell all ranks, in host memory, whether this one is to train something else by now."""
        self._agreed.structure.check()
        of_experts = {is_expert(parameter) for parameter in self._agreed.structure.changed}
        others = self.optimizer.has_others or False in of_experts
        self._has_changed = others or True in of_experts
        topology = self._context.topology
        changes = [[0.0] * (1 + topology.ep_size) for _ in range(topology.pp_size)]
        changes[topology.pp_rank][0] = float(others)
        changes[topology.pp_rank][1 + topology.ep_rank] = float(True in of_experts)
        numbers = [*chain.from_iterable(changes), float(self._agreed.wants_tied)]
        self._asked = Question(numbers, self._context.host_group, ReduceOp.SUM)

    def _changes(self) -> list[Sequence[float]]:
        """How many ranks of each stage have changed something: experts apart, by who holds them."""
        assert self._asked is not None
        answer, each = self._asked.answer()[:-1], 1 + self._context.topology.ep_size
        return [answer[start : start + each] for start in range(0, len(answer), each)]

    @property
    def _is_tied_trained(self) -> bool:
        """Whether a weight that stages share was to be trained when ranks were asked last."""
        assert self._asked is not None
        return self._asked.answer()[-1] > 0

    @property
    def _stage_has_changed(self) -> bool:
        return any(self._changes()[self._context.topology.pp_rank])

    def _are_shared(self, changes: Sequence[Sequence[float]]) -> bool:
        topology, alone = self._context.topology, self._context.host_group is None
        ranks = 1 if alone else topology.stage_size
        holders = 1 if alone else ranks // topology.ep_size
        return all(
            others in (0, ranks) and all(count in (0, holders) for count in experts)
            for others, *experts in changes
        )

    def _follow(self) -> None:
        self._agreed.check_frozen(self._stage_group)
        self.optimizer.follow(self._replace_buffers)
        self._agreed.freeze_others(self._stage_group)

    def run(self, pieces: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of the micro-batches: this rank's loss, a scalar in fp32."""
        self.optimizer.begin()
        self.buffers.zero()
        with self._anomalies.watching() if self._anomalies is not None else nullcontext():
            loss = self._agreed.engine.train(pieces, self._gradient_ready)
        self.buffers.finish()
        return loss

    def _gradient_ready(self, parameters: tuple[Any, ...]) -> None:
        self.buffers.ready(parameters, lambda: self._agreed.engine.lanes.on(Lane.DP))

    def _replace_buffers(self) -> GradientBuffers:
        self.buffers.close()
        self.buffers = self._make_buffers()
        return self.buffers
