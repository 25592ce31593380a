"""What a LightningModule adds to be trained with two strands, and one that is ready to use."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import _load_state
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_dhellam.checkpoint.from_file import take_part
from lightning_dhellam.checkpoint.lightning_file import read_whole
from lightning_dhellam.checkpoint.model import restore_origin
from lightning_dhellam.data.repeats import without_repeats
from lightning_dhellam.engine.documents import documents_of
from lightning_dhellam.engine.unread import check_unread
from lightning_dhellam.engine.weights import IGNORED
from lightning_dhellam.engine.words import in_our_words
from lightning_dhellam.hosted import RunnerStrategy
from lightning_dhellam.late import LateValue, show
from lightning_dhellam.layers import Loss
from lightning_dhellam.models import (
    CausalLM,
    LoRA,
    ModelConfig,
    add_lora,
    import_huggingface,
    preset,
    save_huggingface,
)
from lightning_dhellam.models.lora import targets_of
from lightning_dhellam.models.pretrained import check_preset, pretrained_config, stored_dtype
from lightning_dhellam.optimizing import Schedule, decay_groups
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.values import check_kinds

_SEED = 1234


class DualStrandMixin(LightningModule):
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

    model_config: ModelConfig
    lora: LoRA | None = None
    model: CausalLM
    pretrained: Path | None = None
    _late: LateValue | None = None
    _is_building = False

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        """A module that begins with the weights of a folder of Hugging Face.

        What the model is the folder says; its weights are read when a run begins, by each rank its
        share. All other arguments are those of the module.

        Raises:
            ValueError: the folder cannot be used, or an argument contradicts it.
        """
        if "pretrained" in inspect.signature(cls).parameters:
            return cls(*args, pretrained=os.fspath(folder), **kwargs)
        module = cls(*args, **kwargs)
        module.pretrained, module.model_config = Path(folder), pretrained_config(folder)
        return module

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """A module with the weights of a checkpoint: the whole model, in this process.

        As Lightning's own, whose files it takes as well; a folder that `DHellamStrategy` has
        written may be of a run of any sizes. Without a `map_location`, a device, the weights of a
        folder are on the host. A Trainer takes the module further under any strategy.

        Raises:
            ValueError: a file of the folder is missing or damaged, or an argument is for files.
        """
        if not isinstance(checkpoint_path, str | os.PathLike) or not os.path.isdir(checkpoint_path):
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )
        for name, value, kinds in (
            ("hparams_file", hparams_file, ()),
            ("map_location", map_location, (str, torch.device)),
        ):
            if value is not None and not isinstance(value, kinds):
                raise ValueError(
                    f"{name}={value!r} cannot be used with a folder, {checkpoint_path}: give"
                    " arguments of the module by name, and a device as map_location"
                )
        found, _ = read_whole(Path(checkpoint_path), with_state=False)
        found.setdefault(cls.CHECKPOINT_HYPER_PARAMS_KEY, {}).update(kwargs)
        module = _load_state(cls, found, strict=strict, **kwargs)
        assert isinstance(module, cls)
        restore_origin(module.model, found)
        return module if map_location is None else module.to(map_location)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        *,
        max_shard_size: int | str = "5GB",
        tokenizer: Any = None,
        origin: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the model as a folder that transformers loads: see `models.save_huggingface`.

        In a run and after it, every rank must call this. Before any run the weights are those of
        `pretrained`, or the first ones.
        """
        model = self._modules.get("model")
        if model is None:
            model = self.model if self._has_place else self._unplaced()
        assert isinstance(model, CausalLM)
        trainer = self._trainer
        if trainer is None or self._strands is not None or trainer.is_global_zero:
            save_huggingface(
                model,
                folder,
                dtype,
                max_shard_size=max_shard_size,
                tokenizer=tokenizer,
                origin=origin,
            )
        if trainer is not None and self._strands is None:
            trainer.strategy.barrier()

    def _unplaced(self) -> CausalLM:
        """The whole model on the host, for which no run has a place."""
        context = ParallelContext.single(torch.device("cpu"))
        if self.pretrained is None:
            return self.build_model(context, torch.get_default_dtype())
        dtype = stored_dtype(self.pretrained)
        model = CausalLM(self.model_config, context, dtype, drawn=False)
        import_huggingface(model, self.pretrained)
        return model

    def build_model(self, context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        """Make this rank's part of the model. Layers may be replaced by modules of your own.

        Such a block maps hidden states [S, B, H] to the same shape. It gets whole sequences, which
        with tensor parallelism every rank computes alike. One that works token by token, and sets
        `token_wise = True` on its class, gets each rank's own tokens instead, [S / TP, B, H], and
        computes them once. With context parallelism every block must be such a one; it gets the
        tokens of its rank's two pieces of each sequence. Megatron's parallel linear layers inside a
        block split their weights either way. Where samples hold several documents, a block is not
        told, and one that mixes along the sequence mixes them. Parameters that are not split, and
        buffers, start as those of the first rank, whatever each rank has drawn; after each training
        step buffers are the first rank's again.

        Layers run in the order of `model.layers`, and a module that is there twice is trained by
        both. With pipeline parallelism every rank must put in the same modules at the same places;
        one of your own belongs to the stage of the layer before it, and the others forget it.
        There each is once in `model.layers`, and layers change places within a chunk only.
        """
        return CausalLM(self.model_config, context, dtype, self._seed)

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

    @override
    def configure_model(self) -> None:
        whole = self._modules.get("model")
        if self._strands is not None:
            context, dtype, _ = self._strands.place()
        else:
            device = torch.device("cpu") if self._trainer is None else self.device_now
            context, dtype = ParallelContext.single(device), torch.get_default_dtype()
        if whole is not None:
            assert isinstance(whole, CausalLM)
            if self._strands is None or whole.context.in_a_run:
                return
        model = self.build_model(context, dtype)
        if self.pretrained is not None and whole is None:
            import_huggingface(model, self.pretrained)
        self.model = model
        self.model.settle()
        if self.lora is not None:
            add_lora(self.model, self.lora, self._seed)
        if whole is not None:
            take_part(self.model, whole)

    def planned_model(self, context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        """This rank's part of the model as `configure_model` makes it, but for weights of a folder.

        It is not kept: `context` may be of a run that is only planned.
        """
        model = self.build_model(context, dtype)
        model.settle()
        if self.lora is not None:
            add_lora(model, self.lora, self._seed)
        return model

    def __getattr__(self, name: str) -> Any:
        # Callbacks may want the model before `configure_model`: to freeze a part of it in `setup`.
        missing = name == "model" and name not in self.__dict__.get("_modules", (name,))
        if missing and not self._is_building and self._has_place:
            self._is_building = True
            try:
                _call_configure_model(self.trainer)
            finally:
                self._is_building = False
        return super().__getattr__(name)

    @property
    def _has_place(self) -> bool:
        """Whether a run has begun, whose processes are there."""
        trainer = self.__dict__.get("_trainer")
        if trainer is None or trainer.state.status is not TrainerStatus.RUNNING:
            return False
        strategy = trainer.strategy
        if isinstance(strategy, RunnerStrategy):
            return strategy.has_place()
        return trainer.world_size == 1 or torch.distributed.is_initialized()

    @property
    def _strands(self) -> RunnerStrategy | None:
        """The strategy, if it trains with two strands."""
        trainer = self._trainer
        strategy = trainer.strategy if trainer is not None else None
        return strategy if isinstance(strategy, RunnerStrategy) else None

    @property
    def _seed(self) -> int:
        """The seed of what the model draws when it is made."""
        strands = self._strands
        is_placed = strands is not None and strands.has_place()
        return strands.place().seed if strands is not None and is_placed else seed_of_run()

    @property
    def device_now(self) -> torch.device:
        """The device that this process trains on."""
        return self.trainer.strategy.root_device

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


class LanguageModel(DualStrandMixin):
    """A model of a preset or a folder, trained with AdamW, linear warm-up and a schedule by name.

    Args:
        preset: name of a published or built-in shape, such as `llama-3-8b`; `llama-tiny` if neither
            it nor `pretrained` is given.
        overrides: fields of `ModelConfig` to change, such as `{num_layers: 8}`.
        learning_rate: the highest learning rate.
        weight_decay: of matrices; norms and biases are not decayed.
        betas: of AdamW.
        warmup_steps: optimizer steps of linear warm-up.
        min_lr_ratio: learning rate at the end of training, as a part of the highest.
        schedule: of the learning rate after the warm-up: `cosine`, `linear`, `constant`, or `wsd`,
            which stays at the highest and goes down in a line in the last steps.
        decay_steps: optimizer steps in which `wsd` goes down; a tenth of all if left out.
        decay_embeddings: whether weight decay is of embeddings as well.
        lora: adapters to train beside a frozen model: `{rank: 16, alpha: 32}`.
        pretrained: folder of Hugging Face whose weights training begins with, and which says what
            the model is. `overrides` change what its weights leave open, such as `hidden_dropout`.

    Raises ValueError, by name, for a value of another kind or one that no model can have.
    """

    def __init__(
        self,
        preset: str | None = None,
        overrides: dict[str, Any] | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 0,
        min_lr_ratio: float = 0.1,
        schedule: str = "cosine",
        decay_steps: int | None = None,
        decay_embeddings: bool = True,
        lora: LoRA | None = None,
        pretrained: str | None = None,
    ) -> None:
        check_kinds(LanguageModel.__init__, locals())
        super().__init__()
        self.save_hyperparameters()
        self.pretrained = None if pretrained is None else Path(pretrained)
        self.model_config = make_config(preset, overrides, pretrained)
        self.lora = lora
        if lora is not None:
            targets_of(self.model_config, lora)  # refuses what the model does not have
        self._schedule = Schedule(schedule, warmup_steps, min_lr_ratio, decay_steps)

    @override
    def configure_optimizers(self) -> Any:
        self._schedule.check(self.trainer.estimated_stepping_batches)
        groups = decay_groups(
            self,
            self.hparams["weight_decay"],
            decay_embeddings=self.hparams["decay_embeddings"],
        )
        optimizer = AdamW(
            groups,
            lr=self.hparams["learning_rate"],
            betas=tuple(self.hparams["betas"]),
            # One pass over weights and state. Lightning's own mixed precision refuses to clip
            # with it, so it is for DHellamStrategy on a GPU.
            fused=True if self._strands is not None and self.device_now.type == "cuda" else None,
        )
        scheduler = LambdaLR(optimizer, self._lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _lr_factor(self, step: int) -> float:
        return self._schedule.factor(step, self.trainer.estimated_stepping_batches)


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


def seed_of_run() -> int:
    """What `seed_everything` was given, or else 1234."""
    return int(os.environ.get("PL_GLOBAL_SEED", _SEED))


def make_config(
    name: str | None, overrides: Mapping[str, Any] | None, pretrained: str | None = None
) -> ModelConfig:
    """The shape `name`, or that of a folder of Hugging Face, with some fields changed.

    Raises:
        ValueError: there is none of that name, or it contradicts the folder.
    """
    if pretrained is None:
        return preset(name or "llama-tiny", **(overrides or {}))
    config = pretrained_config(pretrained, overrides)
    if name is not None:
        check_preset(pretrained, name)
    return config
