"""A picture of how evenly the experts of each layer are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from lightning_dhellam.search.report.pictures import INK, new_figure, save

_SHADES = LinearSegmentedColormap.from_list("load", ["#f3f0e8", "#2f6db3", "#b6423a"])
_MOST = 3.0
"""Load, in even shares, from which on the shade is the same."""
_NUMBERED = 16
"""Experts up to which each has its number beside it."""


def save_load(path: Path, layers: Sequence[int], load: Sequence[Sequence[float]]) -> None:
    """Draw the load of each expert, in that of an even share: a row for each layer.

    Args:
        path: of the picture, whose folder is made if need be.
        layers: their numbers.
        load: tokens of each expert of each layer, in any unit.
    """
    tokens = np.asarray(load, dtype=float)
    shares = tokens / np.maximum(tokens.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    rows, columns = shares.shape
    figure = new_figure(max(5.0, 1.8 + 0.28 * columns), max(2.2, 1.2 + 0.28 * rows))
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", cmap=_SHADES, vmin=0.0, vmax=_MOST)
    axes.set_yticks(range(rows), [str(layer) for layer in layers])
    axes.set_xlabel("expert", color=INK)
    axes.set_ylabel("layer", color=INK)
    if columns <= _NUMBERED:
        axes.set_xticks(range(columns))
        for row, column in np.ndindex(shares.shape):
            text = f"{shares[row, column]:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=INK)
    figure.colorbar(image, label="load, in even shares", extend="max")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
