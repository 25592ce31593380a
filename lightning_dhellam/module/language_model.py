"""A LightningModule that is ready to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_dhellam.models import LoRA, ModelConfig, preset
from lightning_dhellam.models.lora import targets_of
from lightning_dhellam.models.pretrained import check_preset, pretrained_config
from lightning_dhellam.module.mixin import DualStrandMixin
from lightning_dhellam.optimizing import Schedule, decay_groups
from lightning_dhellam.values import check_kinds


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
