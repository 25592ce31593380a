"""A picture of what ranks need memory for: a bar for each stage, a colour for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.patches import Patch

from lightning_dhellam.search.report.pictures import COLOURS, FAINT, INK, bare, new_figure, save

_GIB = 2**30
_SHADES = (*COLOURS.values(), "#4f8f8b", "#8c5a9e", "#7a7a3a", "#b3706b", "#d8d8d2")
_WIDTH = 10.0


def save_memory(
    path: Path | str, stages: Sequence[Mapping[str, int]], limit: int | None = None
) -> None:
    """Draw the memory of each stage's ranks.

    Args:
        path: file of the picture.
        stages: bytes of a rank of each stage, by what for; the same names in each.
        limit: bytes that a rank may take, drawn as a line.
    """
    figure = new_figure(_WIDTH, 1.2 + 0.36 * len(stages))
    axis = figure.subplots()
    shades = dict(zip(stages[0], _SHADES, strict=True))
    for stage, parts in enumerate(stages):
        start = 0.0
        for name, size in parts.items():
            axis.barh(stage, size / _GIB, left=start, height=0.8, color=shades[name])
            start += size / _GIB
    if limit is not None:
        axis.axvline(limit / _GIB, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axis.set_yticks(range(len(stages)), [f"stage {stage}" for stage in range(len(stages))])
    axis.set_ylim(len(stages) - 0.5, -0.5)
    axis.set_xlabel("GiB on each rank", color=INK)
    handles = [Patch(color=shade, label=name) for name, shade in shades.items()]
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(shades), frameon=False, fontsize=9
    )
    bare(axis)
    save(figure, path)
