"""The table of `dhellam bench checkpoint`: a row for each way."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_dhellam.bench.report import Row

COLUMNS = ("way", "save GB/s", "load GB/s", "save s", "load s", "save ratio", "load ratio")


def rows_of(times: Mapping[str, Mapping[str, float]], size: int) -> list[Row]:
    """The rows of all ways; a ratio is the speed of checkpoints by that of the way.

    Args:
        times: seconds of `save` and `load` by way, `checkpoint` among them.
        size: bytes of what is saved.
    """
    ours = times["checkpoint"]
    return [
        {
            "way": way,
            **{f"{what} GB/s": size / taken[what] / 1e9 for what in ("save", "load")},
            **{f"{what} s": taken[what] for what in ("save", "load")},
            **{f"{what} ratio": taken[what] / ours[what] for what in ("save", "load")},
        }
        for way, taken in times.items()
    ]
