"""Numbers on the command line, refused by their rule."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from math import isfinite


def add_sizes(parser: ArgumentParser) -> None:
    """Add the sizes of a pipeline: `--stages` and `--micro_batches`."""
    parser.add_argument("--stages", type=positive, required=True, metavar="P")
    parser.add_argument("--micro_batches", type=positive, required=True, metavar="M")


def positive(text: str) -> int:
    """The whole number of at least 1 that `text` says."""
    return int(_number(text, int, lambda value: value >= 1, "a whole number of at least 1"))


def counted(text: str) -> int:
    """The whole number of at least 0 that `text` says."""
    return int(_number(text, int, lambda value: value >= 0, "a whole number of at least 0"))


def share(text: str) -> float:
    """The number from 0 up to less than 1 that `text` says."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number from 0 up to less than 1")


def amount(text: str) -> float:
    """The number above 0 that `text` says."""
    return _number(text, float, lambda value: value > 0, "a number above 0")


def not_negative(text: str) -> float:
    """The number of at least 0 that `text` says."""
    return _number(text, float, lambda value: value >= 0, "a number of at least 0")


def _number(
    text: str, kind: Callable[[str], float], allowed: Callable[[float], bool], rule: str
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and allowed(value)):
        raise ArgumentTypeError(f"'{text}' must be {rule}")
    return value
