"""The steps of a run: what a rank is fed, what it makes of it, and that all ranks go along."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from lightning_dhellam.engine.documents import remember
from lightning_dhellam.engine.inputs import check_ids, pinned
from lightning_dhellam.engine.unread import check_unread
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.runner import Runner
from lightning_dhellam.strategy.agreed_loader import RepeatingLoader, keeping_place
from lightning_dhellam.strategy.checks import check_trainer
from lightning_dhellam.strategy.feeding import Feeding
from lightning_dhellam.strategy.planning import MemoryWatch
from lightning_dhellam.strategy.saving import SavingStrategy
from lightning_dhellam.strategy.skipping import Skipping
from lightning_dhellam.strategy.termination import Termination

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SteppingStrategy(SavingStrategy):
    """A strategy whose batches go through a `Runner`, and whose ranks step together.

    Its subclass makes the runner.
    """

    _termination: Termination | None = None
    _feeding: Feeding | None = None
    _skipping: Skipping | None = None
    _watch: MemoryWatch | None = None
    _losses_left: int | None = None
    _predicting = 0
    _predicted: list[tuple[Any, int]]

    @property
    def runner(self) -> Runner:
        """What trains: engine, gradient buffers and plan of this rank."""
        if self._runner is None:
            raise RuntimeError(
                "DHellamStrategy.runner does not exist before the model: use it after `setup`"
            )
        return self._runner

    @property
    def _module(self) -> DualStrandMixin:
        """What is trained; `check` has made sure that it can be."""
        assert isinstance(self.lightning_module, DualStrandMixin)
        return self.lightning_module

    def _meet_others(self, trainer: pl.Trainer) -> None:
        """Have ranks tell each other what they are fed, and when to end."""
        self._predicted = []
        self._open_background(trainer)
        if self.context.emulated:
            return
        self._termination = Termination(trainer, self.context.host_group, self.saving_at_once)
        if self.context.host_group is not None:
            self._feeding = Feeding(self.context.topology, self.context.host_group)
            self._skipping = Skipping(trainer, self.context.host_group)

    def _leave_others(self) -> None:
        if self._termination is not None:
            self._termination.close()
        if self._skipping is not None:
            self._skipping.close()
        self._termination = self._feeding = self._skipping = self._watch = None

    @override
    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        if self._termination is not None and not self._module.trainer.training:
            self._termination.check()
        self._predicting = dataloader_idx
        batch = self._module.in_our_words(batch)  # what is compared and checked here
        if self._feeding is not None:
            self._feeding.compare(batch, (self._module.trainer.state.stage, dataloader_idx))
        if self.root_device.type != "cpu":  # on the host the runner sees them itself
            check_ids(batch, self.runner.intake.limits)
            check_unread(batch)
            batch = apply_to_collection(batch, Tensor, pinned)
        # What the host must know of documents it reads there, and waits for no device.
        return remember(super().batch_to_device(batch, device, dataloader_idx), batch)

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        if self._feeding is None:
            return keeping_place(dataloader)
        if self._module.trainer.state.fn is not TrainerFn.PREDICTING:
            return self._feeding.loader(dataloader)
        self._predicted.append((self._feeding.repeating(dataloader), 0))
        return self._predicted[-1][0]

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, or None of a batch that is there once more; see `RepeatingLoader`."""
        output = super().predict_step(*args, **kwargs)
        if not self._predicted:
            return output
        loader, number = self._predicted[self._predicting]
        self._predicted[self._predicting] = loader, number + 1
        own = loader.count if isinstance(loader, RepeatingLoader) else None
        return output if own is None or number < own else None

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._losses_left = 1
        try:
            output = super().training_step(*args, **kwargs)
            if self._losses_left and output is not None:
                raise ValueError(
                    "training_step returned a loss without self.batch_loss(batch), which computes"
                    " the gradients under DHellamStrategy: call it (for a loss of your own override"
                    " compute_loss), or return None on all ranks to skip the batch"
                )
            if output is not None or self._skipping is None:
                return output
            if not self._losses_left:
                raise ValueError(
                    "training_step returned None after self.batch_loss(batch), when the other ranks"
                    " had its gradients already: return None before that to skip a batch"
                )
            return self._skipping.skips()
        finally:
            self._losses_left = None

    def current_runner(self) -> Runner:
        """What trains; see `runner`."""
        return self.runner

    def is_told_to_end(self) -> bool:
        """Whether this process was told to end."""
        return self._termination is not None and self._termination.told

    def ending_at_once(self) -> AbstractContextManager[None]:
        """Inside, SIGTERM is raised where it comes; see `Termination.at_once`."""
        return self._termination.at_once() if self._termination is not None else nullcontext()

    def run_batch(self, batch: Mapping[str, Any], *, backward: bool) -> Tensor:
        """Loss of this rank's batch, a scalar in fp32; with `backward`, its gradients as well."""
        if not backward:
            return self.runner.evaluate(batch)
        if self._losses_left == 0:
            raise ValueError(
                "training_step called batch_loss twice, and the second gradients would replace the"
                " first: call it once, with one batch that holds all samples"
            )
        if self._skipping is not None and self._losses_left:
            self._skipping.trains()
        if self._watch is not None and not self._watch.has_begun:
            words = self.runner.in_our_words(batch)
            tokens = words.get("tokens") if isinstance(words, Mapping) else None
            shape = tokens.shape if isinstance(tokens, Tensor) else ()
            if len(shape) == 2:  # what is none is refused by the runner, by name
                self._watch.begin(self.runner, self._module, *shape)
        loss = self.runner.train(batch, step=self._module.trainer.global_step)
        self._losses_left = 0 if self._losses_left else None
        return loss

    def run_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [B, S, V] of this rank's batch."""
        return self.runner.predict(batch)

    @override
    def backward(
        self,
        closure_loss: Tensor,
        optimizer: torch.optim.Optimizer | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Nothing is left to do: the gradients are already there."""
        self.precision_plugin.pre_backward(closure_loss, self._module)
        return self.precision_plugin.post_backward(closure_loss, self._module)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # A callback such as GradientAccumulationScheduler may have changed it after the start.
        check_trainer(self._module.trainer)
        if self._background is not None:
            self._background.check()

    def _meet(self) -> None:
        if self._termination is not None:
            self._termination.meet()

    @override
    def on_train_end(self) -> None:
        self._meet()
        self.wait_for_checkpoint()
        if self._optimizer is not None:
            self.runner.settle()
        if self._watch is not None:
            self._watch.end(self.runner)

    @override
    def on_predict_end(self) -> None:
        """Take away the places of batches that were there once more."""
        loop = self._module.trainer.predict_loop
        if not loop.return_predictions:
            return
        found = [loop.predictions] if loop.num_dataloaders == 1 else loop.predictions
        for (loader, _), predictions in zip(self._predicted, found, strict=False):
            if isinstance(loader, RepeatingLoader) and loader.count is not None:
                del predictions[loader.count :]

    # Where ranks meet outside of steps.
    on_validation_start = on_validation_end = _meet
    on_test_start = on_predict_start = _meet
