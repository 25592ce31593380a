"""How evenly experts are used: losses and load of a step over all ranks, and a bias that follows.

The operators add up what this rank's micro-batches have (`parallel.tally`). Once a step the sums of
all ranks are added up, in one message that no host waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from lightning_dhellam.layers.balancing import LOAD, NAMES, logged
from lightning_dhellam.layers.routing import stepped_bias
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.tally import Tally


@dataclass(frozen=True)
class ExpertUse:
    """How a step has used the experts, the same on every rank.

    Attributes:
        layers: numbers of the L layers that have experts.
        losses: by name, as Megatron-core logs them: `load_balancing_loss`, `z_loss` and so on, of
            each layer, [L] in fp32, without coefficients; means over the global batch.
        load: how many tokens have chosen each expert of each layer, [L, E] in fp32.
    """

    layers: tuple[int, ...]
    losses: Mapping[str, Tensor]
    load: Tensor

    @property
    def means(self) -> dict[str, Tensor]:
        """Each loss as a mean over the layers: a scalar."""
        return {name: values.mean() for name, values in self.losses.items()}

    @property
    def imbalance(self) -> Tensor:
        """Load of the busiest expert of each layer, in that of an even share: [L]."""
        return self.load.amax(1) / self.load.mean(1)


class Balance:
    """Collects how a model's experts are used, and moves the biases that balance them.

    Every rank must make one, and use it alike.

    Args:
        model: this rank's part of it.

    Attributes:
        last: how the last step has used the experts; None before the first, and without experts.
    """

    def __init__(self, model: CausalLM) -> None:
        context, config = model.context, model.transformer_config
        self._group, self._device = context.world_group, context.device
        self._routers = dict(_routers(model))
        everywhere = of_all_ranks([*self._routers], context.host_group)
        self._layers = tuple(sorted({index for own in everywhere for index in own}))
        self._widths = logged(config) if self._layers else {}
        self._rate = config.moe_router_bias_update_rate
        self._pending: Tensor | None = None
        self.last: ExpertUse | None = None

    @property
    def has_losses(self) -> bool:
        """Whether there are losses beside that of the model."""
        return len(self._widths) > 1

    @property
    def spans_replicas(self) -> bool:
        """Whether a loss is taken over the tokens of all data-parallel ranks."""
        return NAMES["global_aux_loss"] in self._widths

    def saw(self, tally: Tally, scale: Tensor | None = None) -> None:
        """A step has computed its gradients, and `tally` has what this rank's part of it used.

        Args:
            tally: of the step.
            scale: what its losses were multiplied by, a scalar; None for 1.
        """
        if not self._layers:
            return
        sums = tally.everywhere(self._widths, self._layers, self._group, self._device)
        load = sums.pop(LOAD)
        if scale is not None:
            sums = {name: values / scale for name, values in sums.items()}
        self.last = ExpertUse(self._layers, {k: v.flatten() for k, v in sums.items()}, load)
        self._pending = load

    def step(self, finite: Tensor | None) -> None:
        """The optimizer has stepped: biases follow the load, unless the step was left out.

        Args:
            finite: whether it was not left out, a scalar; None if it cannot have been.
        """
        load, self._pending = self._pending, None
        if load is None:
            return
        for index, router in self._routers.items():
            bias = getattr(router, "expert_bias", None)
            if bias is not None:
                row = load[self._layers.index(index)]
                moved = stepped_bias(bias, row, self._rate)
                bias.copy_(moved if finite is None else torch.where(finite, moved, bias))


def _routers(model: CausalLM) -> list[tuple[int, nn.Module]]:
    """The routers of this rank's layers, by the layers' numbers in the model."""
    return [
        (index, module.router)
        for index, layer in enumerate(model.layers)
        for module in layer.children()
        if isinstance(module, MoELayer)
    ]
