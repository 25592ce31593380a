"""The state of an optimizer while the parameters that it steps become others.

Where it is sharded, ranks then have other parts of the parameters, so each gets the whole state
first, and keeps what its new part needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_dhellam.parallel.collectives import of_all_ranks

_MASTER = "master weight"
State = dict[str, dict[str, Any]]
"""By parameter what the optimizer knows of it, and its master weight if there is one."""


@contextmanager
def requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Megatron makes buffers, and masters, of what requires a gradient just then."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def whole_state(
    saved: Mapping[str, Any], shapes: Mapping[str, torch.Size], group: dist.ProcessGroup | None
) -> State:
    """The whole state of some parameters.

    Args:
        saved: what `ModelParallelOptimizer.state_dict` returns.
        shapes: of these parameters.
        group: over which they are sharded, all of whose ranks must call this; None if they are not.
    """
    masters = saved["master_weights"]
    own: State = {
        name: {**saved["state"].get(name, {}), **_named(_MASTER, masters.get(name))}
        for name in {**saved["state"], **masters}
        if name in shapes
    }
    if group is None:
        return own
    parts = saved["parts"]
    whole: State = {}
    for name, kinds in _kinds(own, parts, group).items():
        whole[name] = {}
        for key, (dtype, device, value) in kinds.items():
            if dtype is None:
                whole[name][key] = value.to(device) if isinstance(value, Tensor) else value
                continue
            full = torch.zeros(shapes[name].numel(), dtype=dtype, device=device)
            if key in own.get(name, {}):
                start, end = parts[name]
                full[start:end] = own[name][key].reshape(-1)
            dist.all_reduce(full, group=group)
            whole[name][key] = full.view(shapes[name])
    return whole


def put_back(
    optimizer: Optimizer,
    stepped: Sequence[tuple[str, Tensor]],
    state: State,
    parts: Mapping[str, Sequence[int]],
) -> None:
    """Give `optimizer` what `whole_state` has of the parameters that it steps on this rank.

    Args:
        optimizer: the user's.
        stepped: what it steps, with the names.
        state: by parameter.
        parts: from which element to which, for those of which this rank has a part.
    """
    for name, parameter in stepped:
        of_it = {key: _part(value, parts.get(name)) for key, value in state.get(name, {}).items()}
        master = of_it.pop(_MASTER, None)
        if master is not None:
            parameter.data.copy_(master)
        if of_it:
            optimizer.state[parameter] = of_it


def _kinds(
    own: State, parts: Mapping[str, Any], group: dist.ProcessGroup
) -> dict[str, dict[str, tuple[torch.dtype | None, torch.device | None, Any]]]:
    """The type and device of each value that ranks have parts of, and all others themselves."""
    mine = {
        name: {
            key: (value.dtype, value.device.type, None)
            if isinstance(value, Tensor) and value.dim()
            else (None, getattr(value, "device", torch.device("cpu")).type, _on_host(value))
            for key, value in values.items()
        }
        for name, values in own.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for theirs in of_all_ranks(mine, group):
        for name, kinds in theirs.items():
            found.setdefault(name, {}).update(kinds)
    return found


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _named(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: value}


def _part(value: Any, part: Sequence[int] | None) -> Any:
    if part is None or not isinstance(value, Tensor) or not value.dim():
        return value.clone() if isinstance(value, Tensor) else value
    return value.reshape(-1)[part[0] : part[1]].clone()
