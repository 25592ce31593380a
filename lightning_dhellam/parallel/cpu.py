"""The CPU stand-in: lets Megatron-core, which allocates on CUDA by name, run on the CPU with gloo.

Inside `megatron_device(cpu)` the process believes that it has one CUDA device, which is the CPU:
allocations that name ``cuda`` land in host memory, ``Tensor.type()`` answers with the CUDA name
(Megatron's optimizers sort parameters by it), and CUDA's random generator is the CPU's. Its router
does without transformer-engine's GEMM, and its expert exchange takes sizes that are on the CPU
already.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
# Megatron's tracker warns when the CPU generator moves while CUDA's is forked; here they are one.
_RNG_LOGGER = logging.getLogger("megatron.core.tensor_parallel.random")


@contextmanager
def megatron_device(device: torch.device) -> Iterator[None]:
    """Make ``device`` the one that Megatron-core allocates on, for this thread.

    On CUDA nothing changes. On the CPU, enter it around everything that runs Megatron code:
    construction, forward, backward, gradient reduction, optimizer step. Re-entrant; everything
    is restored when the outermost context ends.
    """
    if device.type == "cuda" or getattr(_inside, "value", False):
        yield
        return
    _inside.value = True
    _install()
    try:
        with _RedirectCudaToCpu():
            yield
    finally:
        _uninstall()
        _inside.value = False


class _RedirectCudaToCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type:
            return _tensor_type(func, args, kwargs or {})
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = (args[0], *(_CPU if _is_cuda(arg) else arg for arg in args[1:]))
        return func(*args, **(kwargs or {}))


def _tensor_type(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | torch.Tensor:
    if len(args) == 1 and not kwargs:
        name: str = func(args[0])
        return name.replace("torch.", "torch.cuda.", 1)
    if len(args) > 1 and isinstance(args[1], str):
        args = (args[0], args[1].replace("torch.cuda.", "torch.", 1), *args[2:])
    return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and (device == "cuda" or device.startswith("cuda:"))


class _CpuGenerators:
    """``torch.cuda.default_generators`` of a machine whose every CUDA device is the CPU."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


class _HostEvent:
    """An event of such a machine, which has happened."""

    def synchronize(self) -> None:
        """Return at once."""


class _HostStream:
    """``torch.cuda.current_stream()`` of such a machine: whatever was issued is done."""

    def wait_event(self, event: object) -> None:
        """Return at once."""

    def wait_stream(self, stream: object) -> None:
        """Return at once."""

    def record_event(self) -> _HostEvent:
        """An event that has happened."""
        return _HostEvent()


class _NotTheForkedGenerator(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


def _get_rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _stream(stream: object) -> AbstractContextManager[None]:
    return nullcontext()


def _on_the_host(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron's function of this place makes of tensors on a GPU: sizes of an exchange."""
    return value.numpy() if as_numpy and isinstance(value, torch.Tensor) else value


# `is_initialized` must be true, or torch queues every generator write for a CUDA start that never
# comes, and the queue holds a copy of the state for each.
_REPLACEMENTS: dict[tuple[Any, str], object] = {
    (torch.cuda, "current_device"): lambda: _CPU,
    (torch.cuda, "current_stream"): lambda device=None: _HostStream(),
    (torch.cuda, "synchronize"): lambda device=None: None,
    (torch.cuda, "is_initialized"): lambda: True,
    (torch.cuda, "default_generators"): _CpuGenerators(),
    (torch.cuda, "get_rng_state"): _get_rng_state,
    (torch.cuda, "set_rng_state"): _set_rng_state,
    (torch.cuda, "manual_seed"): _manual_seed,
    (torch.cuda.random, "get_rng_state"): _get_rng_state,
    (torch.cuda.random, "set_rng_state"): _set_rng_state,
    (torch.cuda, "stream"): _stream,
    # It is for GPUs. Where it is not installed, `versions` says so already.
    (moe_utils, "te_general_gemm"): None,
    # The compiler does not know that CUDA is the CPU here.
    (TopKRouter, "_apply_expert_bias"): inspect.unwrap(TopKRouter._apply_expert_bias),
    (token_dispatcher, "maybe_move_tensor_to_cpu"): _on_the_host,
    # The first dispatcher of a process makes a stream for all.
    (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream"): _HostStream(),
}

_inside = threading.local()
_lock = threading.Lock()
_depth = 0
_originals: dict[tuple[Any, str], object] = {}
_filter = _NotTheForkedGenerator()


def _install() -> None:
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            for (owner, name), replacement in _REPLACEMENTS.items():
                _originals[owner, name] = getattr(owner, name)
                setattr(owner, name, replacement)
            _RNG_LOGGER.addFilter(_filter)


def _uninstall() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            for (owner, name), original in _originals.items():
                setattr(owner, name, original)
            _originals.clear()
            _RNG_LOGGER.removeFilter(_filter)
