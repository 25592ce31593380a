"""Checkpoints of a loop of one's own: of the form of a Trainer's, as far as they hold the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import lightning

from lightning_dhellam.checkpoint import folder, writing
from lightning_dhellam.checkpoint.finite import Finiteness
from lightning_dhellam.checkpoint.model import (
    check_model,
    described,
    origin_of,
    restore_origin,
)
from lightning_dhellam.checkpoint.shares import Share, shares_of
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.collectives import together
from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.parallel.optimizer_state import Restored
from lightning_dhellam.remote import Folder

WEIGHTS = "model."
"""Before the names of weights: a Trainer's module has the model by this name."""
_STEPS = "global_step"
"""Where a Trainer's checkpoint has the number of steps."""
_OF_A_TRAINER = {"epoch": 0, "pytorch-lightning_version": lightning.__version__}
"""What a Trainer asks of a checkpoint that it evaluates."""


def save(
    path: Folder,
    model: CausalLM,
    optimizer: ModelParallelOptimizer | None,
    settings: Mapping[str, Any] | None,
    extra: Mapping[str, Any],
) -> None:
    """Write a checkpoint. Every rank must call this.

    Args:
        path: of the folder, on a file system that all ranks see.
        model: this rank's part of it.
        optimizer: whose state is saved as well, if there is one.
        settings: what decides the form of that state.
        extra: what else is to be kept, the same on all ranks.

    Raises:
        OSError: a rank could not write; on every rank, and `path` is as it was before.
        ValueError: weights are not finite, on every rank.
    """
    steps, state = (0, None) if optimizer is None else (optimizer.steps, optimizer.state_dict())
    names = ExpertNames(model)
    weights = {WEIGHTS + name: value for name, value in names.all_of(model.state_dict()).items()}
    common = {_STEPS: steps, "extra": extra, **_OF_A_TRAINER, **origin_of(model)}
    writing.save(
        path,
        model.context,
        common,
        weights,
        _shares(model),
        state,
        settings,
        described(model.config),
        Finiteness(model),
    )


def _shares(model: CausalLM) -> dict[str, Share]:
    return {WEIGHTS + n: s for n, s in shares_of(model, model.context.topology).items()}


def load(
    path: Folder,
    model: CausalLM,
    optimizer: ModelParallelOptimizer | None,
    settings: Mapping[str, Any] | None,
    resume_settings: str = "checkpoint",
) -> dict[str, Any]:
    """Restore `model` and, if there is one, `optimizer`. Every rank must call this.

    Where settings of the optimizer differ, those of `resume_settings` win, and a warning says so.
    Returns what was saved as `extra`, which is nothing where a Trainer has saved.

    Raises:
        ValueError: on every rank, when one of them cannot read its files, or they do not fit.
    """
    group, training = model.context.world_group, optimizer is not None
    lines = together(
        lambda: check_model(path, model.config, training=training, resume_settings=resume_settings),
        group,
    )
    names, shares = ExpertNames(model), _shares(model)
    own, experts = ([WEIGHTS + n for n in part] for part in names.split(model.state_dict()))

    def check_weights(saved: Mapping[str, Any]) -> None:
        found = folder.misfit(_weights(saved), names.all_of(model.state_dict()))
        if found is not None:
            raise ValueError(found)

    every, context = [*own, *experts], model.context
    saved = folder.load(path, context, shares, every, settings, experts, check=check_weights)
    weights = _weights(saved)
    model.load_state_dict(names.rank_of(weights))
    restore_origin(model, saved)
    if optimizer is not None:
        optimizer.reload()
        (found,) = saved["optimizer_states"]

        def restore() -> Restored:
            state = folder.load_state(found, model.context, shares, optimizer.form)
            return optimizer.load_state_dict(state, resume_settings)

        restored = together(restore, group)
        lines += [override.said(resume_settings) for override in restored.overrides]
        optimizer.steps = saved[_STEPS]
    if model.context.topology.rank == 0:
        for line in lines:
            warnings.warn(line, stacklevel=3)
    return dict(saved.get("extra", {}))


def _weights(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint has of the weights of the model, by its own names."""
    return {
        name.removeprefix(WEIGHTS): value
        for name, value in saved["state_dict"].items()
        if name.startswith(WEIGHTS)
    }
