"""What is no piece of a tensor that ranks share, kept as it is while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in mappings, lists and tuples, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def with_copies(value: Any, copies: Mapping[int, Tensor]) -> Any:
    """A copy of `value` that nobody else changes, with other tensors in place of its own.

    Args:
        value: mappings, lists, tuples and whatever else.
        copies: of its tensors, by their `id`; of others it has copies of its own.
    """
    return deepcopy(value, dict(copies))


def on_host(value: Any) -> Any:
    """What `value` is with its tensors in host memory. The host waits for those of a device."""
    tensors = [tensor for tensor in tensors_in(value) if tensor.device.type != "cpu"]
    return with_copies(value, {id(t): t.detach().cpu() for t in tensors}) if tensors else value
