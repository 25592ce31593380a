"""What a LightningModule adds to be trained with two strands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dhellam.data.repeats import without_repeats
from lightning_dhellam.engine.documents import documents_of
from lightning_dhellam.engine.unread import check_unread
from lightning_dhellam.engine.weights import IGNORED
from lightning_dhellam.engine.words import in_our_words
from lightning_dhellam.late import LateValue, show
from lightning_dhellam.layers import Loss
from lightning_dhellam.module.building import BuiltModule


class DualStrandMixin(BuiltModule):
    """Lets a LightningModule train under `DHellamStrategy`, and under any ordinary strategy.

    Set `model_config` in `__init__` and write `configure_optimizers`, as for any module:

        class MyModule(DualStrandMixin):
            def __init__(self):
                super().__init__()
                self.model_config = preset("llama-3-8b", num_layers=8)

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=3e-4)

    Batches are mappings with `tokens` [B, S] and `labels` [B, S] (already shifted; -100 does not
    count), and optionally `loss_mask` [B, S]. Those of Hugging Face's collators, with `input_ids`
    [B, S] and `labels` at the tokens' own places, are put into these words before any step or
    callback sees them: see `in_our_words`. Where samples hold several documents, keys such as
    `position_ids`, `cu_seqlens` or `attention_mask` say where those begin. What batches say by
    other trainers' keys that are not read is refused unless it changes nothing.

    Set `lora` as well, and the model is frozen but for low-rank adapters of its linear layers.

    Override `build_model` for other layers, `compute_loss` for another loss, and any step to log
    something else: `batch_loss` and `batch_logits` do the work under every strategy.

    Attributes:
        model_config: of the model.
        model: this rank's part of it, once a run has begun.
        pretrained: the folder of Hugging Face whose weights training begins with, if any.
    """

    _late: LateValue | None = None

    def compute_loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Override for a custom loss: from `logits` [B, S, V] of a micro-batch to a scalar.

        Runs under autograd on the logits. The loss of a batch is the mean over its samples, of all
        data-parallel ranks in training, of what its micro-batches return; so with a mean over
        tokens, `micro_batch_size` changes it where samples have different numbers of tokens that
        count. This one is such a mean.

        With context parallelism it sees this rank's part of each sequence: two pieces of it, with
        every tensor [B, S, …] of the batch cut alike and `position_ids` [B, S] that say where in
        its document each token stands; the loss is the mean of what the parts return. So a loss
        that looks at neighbouring tokens does not see those of other ranks.

        It runs more often than there are micro-batches: a search times it, and on GPUs a stage of
        a pipeline rehearses with logits that are made up. So it must leave nothing behind, neither
        logs nor counts; buffers are given back.
        """
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            batch["labels"].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        mask = _counts(batch)
        return _mean((losses * mask.flatten()).sum(), mask)

    def in_our_words(self, batch: Any) -> Any:
        """A batch with `input_ids` and no `tokens`, as Hugging Face's collators make, as ours.

        `tokens` are its `input_ids`; its `labels` are shifted by one, those of padding are -100,
        where `attention_mask` [B, S] is 0. `shift_labels` are taken as they are. With a
        `compute_loss` of your own labels stay as they are, since they may mean anything. Any other
        batch is returned as it is.

        Raises:
            ValueError: labels count on padding, were shifted already, or are said twice and differ.
        """
        return in_our_words(batch, own_labels=self.custom_loss is not None)

    @override
    def _apply_batch_transfer_handler(self, batch: Any, *args: Any, **options: Any) -> Any:
        # Not by a hook, of which Lightning warns where there is a data module, which may have it.
        return super()._apply_batch_transfer_handler(self.in_our_words(batch), *args, **options)

    @property
    def custom_loss(self) -> Loss | None:
        """`compute_loss`, if it was overridden; otherwise the vocabulary-parallel loss is used."""
        overridden = type(self).compute_loss is not DualStrandMixin.compute_loss
        return self.compute_loss if overridden else None

    def batch_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean loss over the tokens of this rank's batch that count: a scalar in fp32.

        Under `DHellamStrategy` a training batch has gone forward and backward when this returns,
        and the mean of what the data-parallel ranks get is that over the tokens of the global
        batch: log it with `sync_dist=True`. Under other strategies the result carries its autograd
        graph.
        """
        if self._strands is not None:
            return self._strands.run_batch(batch, backward=self.trainer.training)
        batch = self.in_our_words(batch)
        check_unread(batch, wait=True)
        packed = _packed(batch)
        if self.custom_loss is not None:
            return self.custom_loss(self.model(batch["tokens"], **packed), batch)
        mask = _counts(batch)
        losses = self.model(batch["tokens"], batch["labels"], mask, **packed)
        return _mean(losses.sum(), mask)

    def batch_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits [B, S, V] of this rank's batch, without gradients."""
        if self._strands is not None:
            return self._strands.run_logits(batch)
        batch = self.in_our_words(batch)
        check_unread(batch, wait=True)
        with torch.no_grad():
            return self.model(batch["tokens"], **_packed(batch))

    def grad_norm(self) -> Tensor:
        """2-norm of the gradient of the whole model, over all ranks: a scalar in fp32.

        It is there from `batch_loss` on (from backward on under other strategies), is that before
        clipping until it is clipped, and is not read on the host. Under `DHellamStrategy` it is the
        same on every rank, and NaN where the loss is not finite; `p.grad` of the module's
        parameters may be None there.
        """
        if self._strands is not None:
            return self._strands.current_runner().grad_norm()
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        return torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log `grad_norm`, `skipped_steps` once there are any, and in fp16 `loss_scale`.

        An override should call it.
        """
        self.log("grad_norm", self.grad_norm())
        if self._strands is not None:
            runner = self._strands.current_runner()
            if runner.skipped_steps:
                self.log("skipped_steps", torch.tensor(float(runner.skipped_steps)))
            if runner.loss_scale is not None:
                self.log("loss_scale", runner.loss_scale.clone())

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.log("train_loss", mean)
        self._show("train_loss", mean)
        self._log_expert_losses()
        return loss

    def _log_expert_losses(self) -> None:
        """Log what balances experts, as a mean over the layers, which every rank has."""
        use = None if self._strands is None else self._strands.current_runner().expert_use
        for name, value in use.means.items() if use is not None else ():
            self.log(name, value)

    def _show(self, name: str, scalar: Tensor) -> None:
        """Show a scalar in the progress bar, as soon as the host has it without waiting."""
        if self._late is None:
            self._late = LateValue(scalar.device)
        self._late.put(scalar)
        show(self.trainer, name, self._late.get())

    @override
    def validation_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        loader = _one_of(self.trainer.val_dataloaders, dataloader_idx)
        return self._evaluate("val_loss", batch, batch_idx, loader)

    @override
    def test_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        loader = _one_of(self.trainer.test_dataloaders, dataloader_idx)
        return self._evaluate("test_loss", batch, batch_idx, loader)

    def _evaluate(self, name: str, batch: Mapping[str, Any], batch_idx: int, loader: Any) -> Tensor:
        """Log the mean over all that counts in the data set, each sample once."""
        batch = self.in_our_words(batch)
        own = without_repeats(batch, loader, batch_idx)
        if own is None:
            if self._meets_others:
                self.batch_loss(batch)
            loss, weight = torch.zeros((), device=self.device), torch.zeros(())
        else:
            loss, weight = self.batch_loss(own), self._weight(own)
        # Where nothing counts at all the mean is 0, not 0 / 0.
        size: Any = weight.clamp_min(torch.finfo(torch.float32).tiny)
        self.log(name, loss, prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    @property
    def _meets_others(self) -> bool:
        """Whether ranks with other samples wait for this one, to give each other tokens."""
        strands = self._strands
        return strands is not None and strands.place().context.topology.experts_see_several_batches

    def _weight(self, batch: Mapping[str, Any]) -> Tensor:
        """What the loss of a batch is a mean over: tokens that count, or samples."""
        if self.custom_loss is None:
            return _counts(batch).sum()
        return torch.tensor(float(len(batch["tokens"])))

    @override
    def predict_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """The most likely next token after each position, [B, S]."""
        return self.batch_logits(batch).argmax(dim=-1)


def _one_of(loaders: Any, index: int) -> Any:
    """The DataLoader of that number, of one or of several in a list or a mapping."""
    several = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    return several[index] if isinstance(several, Sequence) else several


def _packed(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model's own forward is told of the documents that samples hold, if they hold any."""
    found = documents_of(batch) if isinstance(batch.get("tokens"), Tensor) else None
    if found is None:
        return {}
    device = batch["tokens"].device
    told = {} if found.positions is None else {"positions": found.positions.to(device)}
    if found.are_packed(slice(None)):
        told["attention_mask"] = found.unseen()[:, None].to(device)
    return told


def _counts(batch: Mapping[str, Any]) -> Tensor:
    """The weight of each label, [B, S] in fp32: 0 where it does not count."""
    mask = (batch["labels"] != IGNORED).float()
    return mask if batch.get("loss_mask") is None else mask * batch["loss_mask"]


def _mean(total: Tensor, weights: Tensor) -> Tensor:
    """The mean of what adds up to `total`; 0, and not 0 / 0, where nothing counts."""
    return total / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
