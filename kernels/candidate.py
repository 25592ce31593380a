"""One implementation of an operator: how it is loaded, and what may stand against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_dhellam.kernels import packages
from lightning_dhellam.kernels.places import Refusal

NO_BLOCKS = (
    "with context parallelism attention is merged from blocks of keys, and it keeps their"
    " log-sum-exp to itself"
)
"""Why a backend of attention cannot be used."""

NO_WINDOW = "it attends to all tokens before, and layers here to a sliding window of them"
"""Why else not."""


@dataclass(frozen=True)
class Candidate:
    """One implementation of an operator.

    Attributes:
        load: imports it.
        refusal: why it cannot compute on a device in a type.
        package: what must be importable, or None.
        distribution: what must be installed, where the name to import does not tell, or None.
        extra: what to install for that.
        remedy: how to come by it otherwise.
        automatic: on which devices it may be chosen without being asked for.
        largest_head: of attention in 16 bits, whose heads must be a multiple of 8 then; 0 where
            any will do.
        multiple: of what attention's heads must be, where `largest_head` does not say it.
        blocks: whether attention over many keys can be had of it in blocks.
        windows: whether it attends to a sliding window.
    """

    load: Callable[[], Any]
    refusal: Refusal
    package: str | None = None
    distribution: str | None = None
    extra: str = "lightning-dhellam[cuda]"
    remedy: str = ""
    automatic: Callable[[torch.device], bool] = lambda device: True
    largest_head: int = 0
    multiple: int = 1
    blocks: bool = True
    windows: bool = True

    def obstacle(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head: int = 0,
        *,
        in_blocks: bool = False,
        in_window: bool = False,
    ) -> str | None:
        """Why it cannot be used here, with heads of this size, or None if it can.

        `in_blocks` says whether attention is over blocks of keys, whose results are merged, and
        `in_window` whether it is to a sliding window in some layers.
        """
        if in_blocks and not self.blocks:
            return NO_BLOCKS
        if in_window and not self.windows:
            return NO_WINDOW
        return self._lack() or self.refusal(device, dtype) or self._unfit(head)

    def _unfit(self, head: int) -> str | None:
        if self.largest_head and (head % 8 or head > self.largest_head):
            return f"its heads are multiples of 8 up to {self.largest_head}, and these are {head}"
        if head % self.multiple:
            return f"its heads are multiples of {self.multiple}, and these are {head}"
        return None

    def _lack(self) -> str | None:
        """What is not installed as it must be, and the remedy."""
        if self.package is not None and not packages.importable(self.package):
            remedy = self.remedy or f"pip install '{self.extra}'"
            return f"it needs the package {self.package}: {remedy}"
        if self.distribution is not None and not packages.installed(self.distribution):
            return f"it needs the package {self.distribution}: pip install '{self.extra}'"
        if self.distribution is not None and not packages.whole(self.distribution):
            return (
                f"another package has replaced files of {self.distribution}: pip install"
                f" --force-reinstall --no-deps {self.distribution}"
            )
        return None
