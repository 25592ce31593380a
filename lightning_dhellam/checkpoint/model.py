"""Which model a checkpoint is of: the same weights compute something else with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from lightning_dhellam.checkpoint import content
from lightning_dhellam.checkpoint.description import ABOUT, MODEL, read_topology
from lightning_dhellam.models.causal_lm import CausalLM
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.rotary_fields import RotaryFields
from lightning_dhellam.remote import Folder

_ORIGIN = "origin"
_RATE = "router_bias_update_rate"
_OF_TRAINING = (
    "hidden_dropout",
    "embedding_dropout",
    "attention_dropout",
    "aux_loss",
    "aux_loss_coefficient",
    "z_loss_coefficient",
    _RATE,
)
_OF_NO_WEIGHT = ("init_std", "max_sequence_length")
"""What weights that are loaded do not compute otherwise."""
_ROPE = tuple(field.name for field in fields(RotaryFields) if field.name != "rotary_fraction")
_ROUTING = (
    "experts_per_token",
    "router_scores",
    "router_pre_softmax",
    "router_scaling_factor",
    "router_groups",
    "router_groups_per_token",
    "router_jitter",
    "router_fp32",
    "capacity_factor",
    "drop_policy",
)
_FREE = (
    *_OF_TRAINING,
    *_ROPE,
    *_ROUTING,
    "norm_epsilon",
)
"""What may change from one run to the next, if that is asked for: no shape depends on it."""


def config_of(saved: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a description is of."""
    given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items()}
    return ModelConfig(**given)


def described(config: ModelConfig) -> dict[str, Any]:
    """A configuration as checkpoints hold it: equal models have equal descriptions."""
    same = config.dropout_of_embedding == config.hidden_dropout
    dropout = None if same else config.embedding_dropout
    given = config.rope_magnitude
    if given is not None and replace(config, rope_magnitude=None).magnitude == given:
        given = None
    found = asdict(config) | {
        "head_dim": config.kv_channels,
        "embedding_dropout": dropout,
        "rope_magnitude": given,
    }
    # The file knows lists only.
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def saved_model(path: Folder) -> dict[str, Any] | None:
    """The description of a checkpoint's model; None if it is not known, as in files of Lightning's
    own and in what version 0.1 has written.

    Raises:
        ValueError: `path` is not a checkpoint, or a newer version has written it.
    """
    about = (
        content.read(path, mapped=True).get(ABOUT, {}) if path.is_file() else read_topology(path)
    )
    found = about.get(MODEL)
    if found is None:
        return None
    fields_now = {field.name: field for field in fields(ModelConfig)}
    for name in found:
        if name not in fields_now:
            raise ValueError(
                f"checkpoint {path} holds a model with {name}={found[name]!r}, which this version"
                " of lightning-dhellam does not know: use the version that wrote it, or a newer one"
            )
    # A field that did not exist yet had the value that it now has when it is left out.
    since = {name: f.default for name, f in fields_now.items() if f.default is not MISSING}
    if "rope_scaling" not in found and found.get("rope_magnitude") == 1.0:
        found = {**found, "rope_magnitude": None}  # which it once was when it was left out
    return {**since, **found}


def check_model(
    path: Folder, config: ModelConfig, *, training: bool, resume_settings: str
) -> list[str]:
    """Refuse a checkpoint of another model; what is worth a line where it is not refused.

    Args:
        path: of the checkpoint.
        config: of this run's model.
        training: whether it goes on training; dropout and what balances experts matter only then.
        resume_settings: `arguments` if settings that no shape depends on may differ.

    Raises:
        ValueError: fields differ, with both values, or `path` is not a checkpoint.
    """
    saved = saved_model(path)
    if saved is None:
        return [
            f"checkpoint {path} does not say which model it is of: if rotary_base, norm_epsilon"
            " and the like are those of this run is not known"
        ]
    own = described(config)
    # One of the two has biases that the other has not.
    other = {_RATE} if (saved[_RATE] is None) != (own[_RATE] is None) else set()
    if config.position_embedding == "learned":
        other.add("max_sequence_length")  # the table of positions has as many rows
    ignored = {*_OF_NO_WEIGHT, *(() if training else _OF_TRAINING)} - other
    different = [name for name in own if name not in ignored and saved[name] != own[name]]
    fixed = [name for name in different if name not in _FREE or name in other]
    if different and (fixed or resume_settings != "arguments"):
        raise ValueError(
            f"checkpoint {path} holds a model with {_listed(different, saved)}, this run has"
            f" {_listed(different, own)}: give the model the same{_remedy(fixed)}"
        )
    return [
        f"{name}: {own[name]}, as this run was given, not {saved[name]}, as in the checkpoint"
        for name in different
    ]


def origin_of(model: CausalLM) -> dict[str, str]:
    """What a checkpoint says of the folder of Hugging Face that its model is from, if it is."""
    return {} if model.origin is None else {_ORIGIN: str(model.origin)}


def restore_origin(model: CausalLM, saved: Mapping[str, Any]) -> None:
    """Let a model know the folder that the weights of a checkpoint are from."""
    found = saved.get(_ORIGIN)
    model.origin = None if found is None else Path(found)


def overrides_for(path: Folder, config: ModelConfig) -> dict[str, Any]:
    """Fields of `config` that make it the model of a checkpoint; none if that is not known."""
    saved, own = saved_model(path) or {}, described(config)
    return {name: value for name, value in saved.items() if value != own[name]}


def _listed(names: list[str], values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={values[name]!r}" for name in names)


def _remedy(fixed: list[str]) -> str:
    if fixed:
        return ", in the module or in model.overrides of a recipe"
    return ", or let this run's win with DHellamStrategy(resume_settings='arguments')"
