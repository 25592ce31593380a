"""Options by which what is gathered travels in 8 bits: what each makes shorter, and changes.

fp8_all_gather     tp   what linear layers in 8 bits gather
context_fp8_keys   cp   keys and values, but of layers with a window
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.plan import Lane

_EXPOSED = 0.02
"""Share of a step that must be exposed on a lane: less than it there is not to be gained."""


@dataclass(frozen=True)
class Narrower:
    """One of these options.

    Attributes:
        lane: that it makes shorter.
        changes: what it changes, where linear layers compute in such 8 bits or none.
    """

    lane: Lane
    changes: Callable[[str | None], str]

    def is_worth_asking(self, exposed: float) -> bool:
        """Whether it could bring something where such a share of a step is exposed on its lane."""
        return exposed >= _EXPOSED


def _of_gathers(fp8: str | None) -> str:
    if fp8 == "current":
        return "it changes no bit"
    return "what weight gradients read is then rounded a second time"


def _of_keys(fp8: str | None) -> str:
    return "keys and values of other ranks are then rounded, by at most 1/16"


NARROWER: Mapping[str, Narrower] = {
    "fp8_all_gather": Narrower(Lane.TP, _of_gathers),
    "context_fp8_keys": Narrower(Lane.CP, _of_keys),
}
"""By the names that users know."""


def narrower(
    topology: Topology,
    windows: Sequence[int | None],
    *,
    fp8: str | None,
    fp8_all_gather: bool,
    context_fp8_keys: bool,
) -> tuple[str, ...]:
    """The options that a run could have, and has not.

    Args:
        topology: its sizes.
        windows: of the model's layers; None where tokens attend to all before them.
        fp8: how linear layers compute in 8 bits, or None.
        fp8_all_gather: whether it has this option.
        context_fp8_keys: whether it has this one.
    """
    could = {
        "fp8_all_gather": fp8 is not None and topology.tp_size > 1 and not fp8_all_gather,
        "context_fp8_keys": topology.cp_size > 1 and None in windows and not context_fp8_keys,
    }
    return tuple(name for name, could_be in could.items() if could_be)
