"""The optimizer that a recipe configures, over a model that is only planned."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_dhellam.models import CausalLM


def configured(read: Mapping[str, Any]) -> Callable[[CausalLM], Optimizer]:
    """What makes the optimizer of a configuration: its own `optimizer`, or the module's.

    Where that cannot be made without a run it is AdamW, which is said.

    Args:
        read: `model`, a module, `trainer`, and perhaps `optimizer`, as they were configured.
    """
    from lightning_dhellam.memory.prediction import adamw

    def make(model: CausalLM) -> Optimizer:
        try:
            given = read.get("optimizer")
            return _of_file(given, model) if given else _of_module(read, model)
        except Exception as error:
            shown = " ".join(str(error).split())
            print(
                f"the optimizer is taken to be AdamW: {type(error).__name__}: {shown}",
                file=sys.stderr,
            )
            return adamw(model)

    return make


def _of_file(given: Mapping[str, Any], model: CausalLM) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    made: Optimizer = resolve_name(given["class_path"])(
        parameters, **(given.get("init_args") or {})
    )
    return made


def _of_module(read: Mapping[str, Any], model: CausalLM) -> Optimizer:
    with _standing(read["model"], model, read["trainer"]) as module:
        made = module.configure_optimizers()
    while not hasattr(made, "param_groups"):
        made = made["optimizer"] if isinstance(made, Mapping) else made[0]
    optimizer: Optimizer = made
    return optimizer


@contextmanager
def _standing(module: Any, model: CausalLM, trainer: Mapping[str, Any]) -> Iterator[Any]:
    """Let a module have a model and a trainer for a while: what is asked before a run begins."""
    steps = trainer.get("max_steps") or -1
    stand_in = SimpleNamespace(
        **{**trainer, "strategy": None},
        estimated_stepping_batches=steps if steps > 0 else math.inf,
        global_step=0,
        current_epoch=0,
    )
    module.model, module._trainer = model, stand_in
    try:
        yield module
    finally:
        module._trainer = None
        del module.model
