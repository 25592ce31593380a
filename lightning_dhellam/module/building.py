"""How a LightningModule's model comes about: built for a place, loaded, saved for others."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import _load_state
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.trainer.states import TrainerStatus
from typing_extensions import override

from lightning_dhellam.checkpoint.from_file import take_part
from lightning_dhellam.checkpoint.lightning_file import read_whole
from lightning_dhellam.checkpoint.model import restore_origin
from lightning_dhellam.hosted import RunnerStrategy
from lightning_dhellam.models import (
    CausalLM,
    LoRA,
    ModelConfig,
    add_lora,
    import_huggingface,
    save_huggingface,
)
from lightning_dhellam.models.pretrained import pretrained_config, stored_dtype
from lightning_dhellam.parallel import ParallelContext

_SEED = 1234


class BuiltModule(LightningModule):
    """Builds its model where a run has a place for it, with weights that are its own or loaded.

    `DualStrandMixin`, which adds the steps, says what its attributes are.
    """

    model_config: ModelConfig
    lora: LoRA | None = None
    model: CausalLM
    pretrained: Path | None = None
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


def seed_of_run() -> int:
    """What `seed_everything` was given, or else 1234."""
    return int(os.environ.get("PL_GLOBAL_SEED", _SEED))
