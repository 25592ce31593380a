"""Imports that take seconds, a third sooner."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 500


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for garbage, of which imports make next to none.

    Torch, Lightning and Megatron-core make a million objects, which it would look through again and
    again. If many modules were imported inside, it leaves out of every later look what there is at
    the end: `dhellam fit` has read its options after 4.5 instead of 6.5 s of a CPU's time.
    """
    looks, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) - modules > _MANY:
            gc.freeze()
        if looks:
            gc.enable()
