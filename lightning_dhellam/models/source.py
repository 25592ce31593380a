"""Weights of Hugging Face to import, and the configuration without which they are only numbers.

Tensors say how large a model is. What it computes with them, its `rope_theta`, epsilon or scaling
of rotary frequencies, only the configuration says: so the two come together, and it is compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.files import read_json
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families import FAMILIES, Family, family_of
from lightning_dhellam.models.families.family import (
    SLIDING,
    WHOLE,
    Windows,
)
from lightning_dhellam.models.families.rope import Found, Theirs, rope_found, rope_of, rope_type
from lightning_dhellam.models.rotary_fields import LLAMA_3
from lightning_dhellam.models.stored import Readable, stored_tensors

CONFIG = "config.json"
_SPELT = {
    "kv_channels": "head_dim",
    "expert_width": "expert_ffn_hidden_size",
    "windows": "sliding_window",
    "magnitude": "rope_magnitude",
}
"""What a user writes, by what is compared."""


def open_weights(
    function: str, architecture: str, source: Any, config: Any
) -> tuple[Mapping[str, Readable], Any]:
    """Tensors by their names, and a configuration or None.

    Args:
        function: what the user has called.
        architecture: the class of Hugging Face whose weights are wanted.
        source: a folder with `config.json` and the tensors, a model of Hugging Face, or tensors.
        config: of the tensors, if `source` does not say it.

    Raises:
        ValueError: `source` is none of these.
    """
    if isinstance(source, str | PathLike) and Path(source).is_dir():
        folder = Path(source)
        tensors = stored_tensors(folder, architecture)
        return tensors, _json(folder / CONFIG) if config is None else config
    if isinstance(source, torch.nn.Module) and hasattr(source, "config"):
        return source.state_dict(), source.config if config is None else config
    if isinstance(source, Mapping):
        if config is None:
            warnings.warn(
                f"{function} was given tensors without their configuration, so rope_theta,"
                " rms_norm_eps and the like are not compared with the model's: give config=... as"
                " well, or the folder that holds both",
                stacklevel=4,
            )
        return source, config
    shown = repr(source) if isinstance(source, str | PathLike) else f"a {type(source).__name__}"
    raise ValueError(
        f"{function} takes a folder that {architecture}.save_pretrained has written, such a"
        f" model, or its state_dict() with its config, not {shown}"
    )


def check_config(config: Any, own: ModelConfig, family: Family) -> None:
    """Refuse a configuration of Hugging Face that is not that of the model `own`.

    Args:
        config: what `config.json` holds, its path or its folder, or a configuration itself.
        own: the model's.
        family: of the model.

    Raises:
        ValueError: with each field that differs or that cannot be expressed.
    """
    theirs = read_config(config)
    problems = [*_inexpressible(theirs, own, family), *_different(theirs, own, family)]
    if problems:
        raise ValueError(
            "the configuration of the weights does not fit the model: "
            + "; ".join(problems)
            + ". Choose the ModelConfig of the weights"
        )


def config_of(source: Any, **overrides: Any) -> ModelConfig:
    """The model that a configuration of Hugging Face describes.

    What only balances experts in training is left out, `router_aux_loss_coef` for one, since it
    multiplies another loss: see `ExpertFields.aux_loss_coefficient`.

    Args:
        source: a folder with `config.json`, that file, what it holds, or a configuration itself.
        overrides: fields of the `ModelConfig` that are to have other values.

    Raises:
        ValueError: of which family it is is not known, or it cannot be expressed; by field.
    """
    theirs = read_config(source)
    known = {family.model_type: family for family in FAMILIES}
    family = known.get(theirs.get("model_type", ""))
    if family is None:
        raise ValueError(
            f"model_type={theirs.get('model_type')!r} is not known here: {', '.join(known)} are"
        )
    said = {ours: value for ours, (_, value) in _found(theirs, family).items()}
    said["head_dim"] = said.pop("kv_channels")
    if "magnitude" in said:
        said["rope_magnitude"] = said.pop("magnitude")
    said.setdefault("max_sequence_length", theirs.get("max_position_embeddings", 8192))
    for ours, (name, usual) in family.training.items():
        said[ours] = theirs.get(name, usual)
    if "expert_width" in said:
        # A family without dense layers has one width, which is that of its experts.
        name = "expert_ffn_hidden_size" if family.dense_layers else "ffn_hidden_size"
        said[name] = said.pop("expert_width")
    if "expert_layers" in said:
        said["moe_layer_freq"] = tuple(map(int, said.pop("expert_layers")))
    longest = overrides.get("max_sequence_length", said["max_sequence_length"])
    said |= _window_fields(said.pop("windows"), longest)
    config = ModelConfig(**{**family.fixed, **said, **overrides})
    usual = replace(config, rope_magnitude=None)
    if "rope_magnitude" not in overrides and usual.magnitude == config.magnitude:
        config = usual
    if not family.misfits(config) and family_of(config) is not family:
        config = replace(config, family=family.model_type)
    problems = list(_inexpressible(theirs, config, family))
    if problems:
        raise ValueError(f"a {family.architecture} that cannot be expressed: {'; '.join(problems)}")
    return config


def _window_fields(windows: Windows, longest: int) -> dict[str, Any]:
    """Fields of a `ModelConfig` whose layers have these windows, over sequences of `longest`."""
    here = [width is not None and width < longest for width in windows]
    if not any(here):
        return {}
    width = next(width for width, is_here in zip(windows, here, strict=True) if is_here)
    layers = None if all(here) else tuple(map(int, here))
    return {"sliding_window": width, "window_layers": layers}


def read_config(config: Any) -> Mapping[str, Any]:
    """What a configuration says, of its folder, its path, or what it is itself.

    Raises:
        ValueError: it is none of these, or cannot be read.
    """
    if isinstance(config, str | PathLike):
        path = Path(config)
        return _json(path / CONFIG if path.is_dir() else path)
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    raise ValueError(
        f"config is a {type(config).__name__}: give what config.json holds, its path, or a"
        " configuration of Hugging Face"
    )


def _inexpressible(theirs: Theirs, own: ModelConfig, family: Family) -> Iterator[str]:
    rope = rope_of(theirs)
    classes = theirs.get("architectures")
    if classes and family.architecture not in classes:
        yield f"architectures={classes}, and only {family.architecture!r} can be expressed here"
    for name, only in {"model_type": family.model_type, **family.only}.items():
        found = rope.get(name, theirs.get(name, only))
        if found != only and not (only is False and found is None):
            yield f"{name}={found!r}, and only {only!r} can be expressed here"
    kind = rope_type(rope)
    if kind not in family.rope_types:
        factor, known = rope.get("factor"), " or ".join(map(repr, family.rope_types[1:]))
        rest = f"only {known} can be expressed here" if known else "no scaling can be expressed"
        yield f"rope_type={kind!r} (factor={factor}), and {rest}"
    if kind == "llama3":
        for name, only in LLAMA_3.items():
            if rope.get(name, only) != only:
                yield f"{name}={rope[name]} of its rope scaling, and only {only} can be expressed"
    for other in sorted({*(theirs.get("layer_types") or ())} - {WHOLE, SLIDING}):
        yield f"layer_types={other!r}, and only {WHOLE!r} or {SLIDING!r} can be expressed here"
    yield from family.refuses(theirs, own)


def _different(theirs: Theirs, own: ModelConfig, family: Family) -> Iterator[str]:
    longest = own.max_sequence_length
    for ours, (name, value) in _found(theirs, family).items():
        mine = getattr(own, ours)
        if ours == "windows":
            value = tuple(None if (w or longest) >= longest else w for w in value)
            value, mine = _in_short(value), _in_short(mine)
        if mine != value:
            yield f"{name}={value!r}, and the model has {_SPELT.get(ours, ours)}={mine!r}"


def _found(theirs: Theirs, family: Family) -> Found:
    """What a configuration says of a model, by our names."""
    found = {ours: (name, theirs.get(name, usual)) for ours, (name, usual) in family.fields.items()}
    heads = found["num_attention_heads"][1]
    name, groups = found["num_query_groups"]
    found["num_query_groups"] = name, heads if groups is None else groups
    usual = found.get("kv_channels", ("head_dim", None))[1]
    width = theirs.get("head_dim", usual)
    found["kv_channels"] = "head_dim", found["hidden_size"][1] // heads if width is None else width
    windows = family.windows(theirs, found["num_layers"][1])
    found["windows"] = "sliding_window", windows
    if family.fixed.get("position_embedding", "rope") != "rope":
        return found | family.more(theirs)
    return found | rope_found(theirs, family.rotary_base) | family.more(theirs)


def _in_short(windows: Windows) -> Any:
    """One number where all layers have the same window, or None where none has."""
    return windows[0] if len({*windows}) == 1 else windows


def _json(file: Path) -> dict[str, Any]:
    return read_json(file, "file of Hugging Face", "fetch or save the model again")
