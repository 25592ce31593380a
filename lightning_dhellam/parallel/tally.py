"""What operators add up over a step: numbers that are logged, and the load of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel.collectives import reduced


class Tally:
    """Sums over the micro-batches of one step, by name and layer. Nothing waits for a device."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, Tensor]] = {}

    def add(self, name: str, layer: int, value: Tensor) -> Tensor:
        """Add `value` to a sum of its shape. Returns the sum so far, which does not change."""
        sums = self._sums.setdefault(name, {})
        sums[layer] = sums[layer] + value if layer in sums else value
        return sums[layer]

    def everywhere(
        self,
        widths: dict[str, int],
        layers: Sequence[int],
        group: ProcessGroup | None,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """The sums of all ranks, by name: [layers, width] in fp32. Every rank must call this.

        Args:
            widths: numbers of each sum, by name.
            layers: of the whole model; where none of this rank has added to one, it adds nothing.
            group: all ranks.
            device: on which they are.
        """
        rows = [
            torch.cat([self._sum(name, layer, width, device) for name, width in widths.items()])
            for layer in layers
        ]
        together = reduced(torch.stack(rows), group, "sum")
        parts = together.split(list(widths.values()), dim=1)
        return dict(zip(widths, parts, strict=True))

    def _sum(self, name: str, layer: int, width: int, device: torch.device) -> Tensor:
        found = self._sums.get(name, {}).get(layer)
        if found is None:
            return torch.zeros(width, device=device)
        return found.reshape(width).float()
