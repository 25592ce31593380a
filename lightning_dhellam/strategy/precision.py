"""What `Trainer(precision=...)` means for a dual-strand run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from typing_extensions import override

from lightning_dhellam.parallel.loss_scale import Scaling
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.precision import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.fabric.utilities.types import Steppable
    from lightning.pytorch import LightningModule


class DHellamPrecision(Precision):
    """Types of weights, gradients and master weights.

    | precision    | weights and activations | gradients | master weights |
    |--------------|-------------------------|-----------|----------------|
    | `32-true`    | fp32                    | fp32      | the weights    |
    | `bf16-mixed` | bf16                    | fp32      | fp32           |
    | `16-mixed`   | fp16                    | fp32      | fp32           |
    | `bf16-true`  | bf16                    | bf16      | the weights    |

    Operators take their types from the model, so nothing is cast on the way and there is no
    autocast. In fp16 the loss is scaled, as `scaling` says. `transformer-engine` is `bf16-mixed`
    whose linear layers compute in 8 bits, as `fp8` says. Raises ValueError for any other precision.
    """

    def __init__(
        self, precision: str, scaling: Scaling | None = None, fp8: str | None = None
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"Trainer(precision='{precision}') does not work with DHellamStrategy: use one of"
                f" {', '.join(PRECISIONS)}"
            )
        self.precision = precision  # type: ignore[assignment]
        self.scaling = scaling or Scaling()
        self.fp8 = fp8
        self.optimizer: ModelParallelOptimizer | None = None
        self.before_update: Callable[[], None] = _nothing

    @classmethod
    def of(cls, plugin: Precision) -> DHellamPrecision:
        """Ours for the plugin that Lightning made of the Trainer's flag."""
        if isinstance(plugin, DHellamPrecision):
            return plugin
        if type(plugin) in (Precision, MixedPrecision, HalfPrecision, DoublePrecision):
            scaler = getattr(plugin, "scaler", None)
            return cls(str(plugin.precision), _scaling_of(scaler) if scaler is not None else None)
        if type(plugin) is TransformerEnginePrecision:
            return cls("bf16-mixed", fp8=_format_of(plugin))
        raise ValueError(
            f"the precision plugin {type(plugin).__name__} does not work with DHellamStrategy: use"
            f" Trainer(precision=...) with one of {', '.join(PRECISIONS)}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return PRECISIONS[self.precision].dtype

    @override
    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Steppable,
        model: LightningModule,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """Run the step, then Lightning's hooks and clipping on its gradients, then the update."""
        assert self.optimizer is not None, "the strategy was not set up"
        result = closure()
        if result is None:  # training_step returned None, to skip this batch
            return None
        # Hooks may change what the update changes, which is in the groups by now, and may save it.
        self.before_update()
        self.optimizer.prepare()
        self._after_closure(model, optimizer)
        self.before_update()
        self.optimizer.step()
        return result

    @override
    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        assert self.optimizer is not None, "the strategy was not set up"
        self.optimizer.clip_by_norm(clip_val)

    @override
    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        assert self.optimizer is not None, "the strategy was not set up"
        self.optimizer.clip_by_value(clip_val)


def _format_of(plugin: TransformerEnginePrecision) -> str:
    """What Lightning's `transformer-engine` means here, where that package computes nothing.

    Raises:
        ValueError: it asks for fp16, or for a recipe of the user's own.
    """
    if plugin.weights_dtype is not torch.bfloat16:
        raise ValueError(
            "precision='transformer-engine-float16' does not work with DHellamStrategy: use"
            " 'transformer-engine', whose activations are bf16"
        )
    if plugin.recipe != type(plugin.recipe)():
        raise ValueError(
            f"TransformerEnginePrecision(recipe={plugin.recipe!r}) does not work with"
            " DHellamStrategy, which scales 8 bits without a history: use DHellamStrategy(fp8=...)"
            " with 'current' or 'blockwise'"
        )
    return "current"


def _scaling_of(scaler: torch.amp.GradScaler) -> Scaling:
    """What the user's scaler does, which scales nothing itself here.

    Raises:
        ValueError: it is of a kind that may do something else.
    """
    if type(scaler) not in (torch.amp.GradScaler, torch.cuda.amp.GradScaler):
        raise ValueError(
            f"the scaler {type(scaler).__name__} does not work with DHellamStrategy, which scales"
            " the loss itself: use torch.amp.GradScaler, whose numbers it takes"
        )
    if not scaler.is_enabled():
        raise ValueError(
            "the scaler is not enabled: with fp16 the loss must be scaled; use"
            " torch.amp.GradScaler(enabled=True), or precision='bf16-mixed'"
        )
    return Scaling(
        initial=scaler.get_scale(),
        growth=scaler.get_growth_factor(),
        backoff=scaler.get_backoff_factor(),
        interval=scaler.get_growth_interval(),
    )


def _nothing() -> None:
    """Nobody reads what is about to change."""
