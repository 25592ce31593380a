"""Options that do nothing in a run of these sizes: each is said by name, and the run goes on.

Nothing is refused, so that a recipe keeps its options while its sizes change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import Topology

_Why = Callable[[Any, Topology, ModelConfig], str]


class _Option(NamedTuple):
    """An option of the strategy.

    Attributes:
        name: as users spell it.
        left_out: values of it that ask for nothing.
        why: why it does nothing, of a strategy, its sizes and its model; empty where it does.
    """

    name: str
    left_out: tuple[Any, ...]
    why: _Why


def _unless_many(size: str, what: str) -> _Why:
    """Why an option does nothing that needs several ranks, where the argument `size` gives one."""
    field = next(field for field, spelt in Topology.SPELLING.items() if spelt == size)

    def why(strategy: Any, topology: Topology, config: ModelConfig) -> str:
        return f"with {size}=1 {what}" if getattr(topology, field) == 1 else ""

    return why


def _without_whole_layers(strategy: Any, topology: Topology, config: ModelConfig) -> str:
    alone = _ALONE(strategy, topology, config)
    windows = "every layer of the model has a window, whose keys are gathered as they are"
    return alone or (windows if None not in config.windows else "")


def _without_ring(strategy: Any, topology: Topology, config: ModelConfig) -> str:
    found = _without_whole_layers(strategy, topology, config)
    if not found and strategy.context_exchange == "all_gather":
        return "with context_exchange='all_gather' keys and values go round in no ring"
    return found


def _without_replicas(strategy: Any, topology: Topology, config: ModelConfig) -> str:
    experts = topology.expert_dp_size if config.num_experts else 1
    if strategy.distributed_optimizer or max(topology.replicas, experts) > 1:
        return ""
    return "no two ranks hold the same weights, so no gradient is reduced"


def _without_experts(strategy: Any, topology: Topology, config: ModelConfig) -> str:
    return "" if config.num_experts else "the model has no experts"


_ALONE = _unless_many("context_parallel_size", "no sequence is shared")
_OPTIONS = (
    _Option(
        "fp8_all_gather", (False,), _unless_many("tensor_parallel_size", "no layer is gathered")
    ),
    _Option("context_fp8_keys", (False,), _without_whole_layers),
    _Option("context_fp32_gradients", (True,), _ALONE),
    _Option("context_exchange", ("ring", "auto"), _ALONE),
    _Option("context_transport", ("auto",), _without_ring),
    _Option(
        "pipeline_transport",
        ("auto",),
        _unless_many("pipeline_parallel_size", "there is one stage"),
    ),
    _Option("expert_tensor_parallel_size", (None,), _without_experts),
    _Option("bucket_size", (None,), _without_replicas),
)
_KERNELS: dict[str, _Why] = {
    "fp8": lambda strategy, *_: "" if strategy.fp8 else "with fp8=None nothing is in 8 bits",
    "grouped": _without_experts,
    "merge": _ALONE,
    "permute": _without_experts,
}
"""Operators that not every run has."""


def idle(strategy: Any, topology: Topology, config: ModelConfig) -> Iterator[str]:
    """Say of each option of a strategy that does nothing with such sizes why, and what to do.

    Args:
        strategy: a `DHellamStrategy`, or whatever has its arguments.
        topology: the sizes of the run.
        config: of the model.
    """
    for option in _OPTIONS:
        value = getattr(strategy, option.name)
        if value not in option.left_out:
            yield from _said(
                f"{option.name}={value!r}", option.name, option.why(strategy, topology, config)
            )
    for operator, backend in (strategy.kernels or {}).items():
        if operator in _KERNELS:
            why = _KERNELS[operator](strategy, topology, config)
            yield from _said(f"kernels={{{operator}: {backend}}}", operator, why)


def _said(given: str, name: str, why: str) -> Iterator[str]:
    if why:
        yield f"{given} does nothing: {why}; leave {name} out"
