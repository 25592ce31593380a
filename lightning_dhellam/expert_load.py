"""A callback that shows how evenly a mixture of experts is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_dhellam.balance import ExpertUse
from lightning_dhellam.hosted import RunnerStrategy
from lightning_dhellam.values import check_kinds


class ExpertLoad(Callback):
    """Logs how evenly experts are used, and draws it when training ends.

    `expert_load` is how many tokens the busiest expert of a layer was chosen by, over those of an
    even share: 1 is even, and the number of experts is the worst. It is a mean over the layers and
    of the global batch, the same on all ranks, and nothing waits for it. The losses that balance
    experts, such as `load_balancing_loss` and `z_loss`, are logged without this callback.

    The picture has a row for each layer and a column for each expert, with the load since training
    began or the last picture was drawn. It is `expert-load.png` in the folder of the first logger.

    Args:
        per_layer: log `expert_load/layer_3` and so on as well.
        picture: draw it.
    """

    def __init__(self, per_layer: bool = False, picture: bool = True) -> None:
        check_kinds(ExpertLoad.__init__, locals())
        self.per_layer = per_layer
        self.picture = picture
        self._load: Tensor | None = None
        self._layers: tuple[int, ...] = ()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load = None

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        use = _use(trainer)
        if use is None:
            return
        self._layers = use.layers
        self._load = use.load if self._load is None else self._load + use.load
        uneven = use.imbalance
        pl_module.log("expert_load", uneven.mean())
        if self.per_layer:
            for layer, value in zip(use.layers, uneven, strict=True):
                pl_module.log(f"expert_load/layer_{layer}", value)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: every rank asks
        load, self._load = self._load, None
        if not self.picture or load is None or not trainer.is_global_zero:
            return
        # Drawing needs matplotlib, which nothing else here does.
        from lightning_dhellam.search.report.experts import save_load

        save_load(Path(folder) / "expert-load.png", self._layers, load.tolist())


def _use(trainer: pl.Trainer) -> ExpertUse | None:
    strategy = trainer.strategy
    if not isinstance(strategy, RunnerStrategy):
        return None
    return strategy.current_runner().expert_use
