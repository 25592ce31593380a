"""Weights of Hugging Face to import, and the configuration without which they are only numbers.

Tensors say how large a model is. What it computes with them, its `rope_theta`, epsilon or scaling
of rotary frequencies, only the configuration says: so the two come together, and it is compared.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.models.config import ModelConfig

_CONFIG = "config.json"
_INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_FIELDS = {
    "num_hidden_layers": ("num_layers", 32),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("ffn_hidden_size", 11008),
    "num_attention_heads": ("num_attention_heads", 32),
    "vocab_size": ("vocab_size", 32000),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False),
}
"""Hugging Face's name of a field: ours, and what LlamaConfig takes where it is left out."""
_ONLY = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
"""Fields of which only one value can be expressed here: that which LlamaConfig takes by itself."""
_LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Constants of the one scaling of rotary frequencies that can be expressed here."""


def open_weights(function: str, source: Any, config: Any) -> tuple[Mapping[str, Tensor], Any]:
    """Tensors by their names, and a configuration or None.

    Args:
        function: what the user has called.
        source: a folder with `config.json` and the tensors, a model of Hugging Face, or tensors.
        config: of the tensors, if `source` does not say it.

    Raises:
        ValueError: `source` is none of these.
    """
    if isinstance(source, str | PathLike) and Path(source).is_dir():
        folder = Path(source)
        return _tensors(folder), _json(folder / _CONFIG) if config is None else config
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
        f"{function} takes a folder that LlamaForCausalLM.save_pretrained has written, such a"
        f" model, or its state_dict() with its config, not {shown}"
    )


def check_config(config: Any, own: ModelConfig) -> None:
    """Refuse a configuration of Hugging Face that is not that of the model `own`.

    Args:
        config: what `config.json` holds, its path or its folder, or a `LlamaConfig`.
        own: the model's.

    Raises:
        ValueError: with each field that differs or that cannot be expressed.
    """
    theirs = _as_mapping(config)
    problems = [*_inexpressible(theirs), *_different(theirs, own)]
    if problems:
        raise ValueError(
            "the configuration of the weights does not fit the model: "
            + "; ".join(problems)
            + ". Choose the ModelConfig of the weights"
        )


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, str | PathLike):
        path = Path(config)
        return _json(path / _CONFIG if path.is_dir() else path)
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    raise ValueError(
        f"config is a {type(config).__name__}: give what config.json holds, its path, or a"
        " LlamaConfig"
    )


def _inexpressible(theirs: Mapping[str, Any]) -> Iterator[str]:
    rope = _rope(theirs)
    kind = rope.get("rope_type", rope.get("type", "default")) or "default"
    for name, only in _ONLY.items():
        found = rope.get(name, theirs.get(name, only))
        if found != only and not (only is False and found is None):
            yield f"{name}={found!r}, and only {only!r} can be expressed here"
    if kind not in ("default", "llama3"):
        factor = rope.get("factor")
        yield f"rope_type={kind!r} (factor={factor}), and only 'llama3' can be expressed here"
    if kind == "llama3":
        for name, only in _LLAMA_3.items():
            if rope.get(name, only) != only:
                yield f"{name}={rope[name]} of its rope scaling, and only {only} can be expressed"


def _different(theirs: Mapping[str, Any], own: ModelConfig) -> Iterator[str]:
    found = {ours: (name, theirs.get(name, usual)) for name, (ours, usual) in _FIELDS.items()}
    heads = found["num_attention_heads"][1]
    groups = theirs.get("num_key_value_heads")
    found["num_query_groups"] = "num_key_value_heads", heads if groups is None else groups
    width = theirs.get("head_dim")
    found["kv_channels"] = "head_dim", found["hidden_size"][1] // heads if width is None else width
    rope = _rope(theirs)
    base = rope.get("rope_theta", theirs.get("rope_theta"))
    found["rotary_base"] = "rope_theta", 10_000.0 if base is None else base
    scaled = rope.get("rope_type", rope.get("type")) == "llama3"
    found["rope_scaling_factor"] = (
        "factor of rope_type 'llama3'",
        rope["factor"] if scaled else None,
    )
    for ours, (name, value) in found.items():
        mine = getattr(own, ours)
        if mine != value:
            field = "head_dim" if ours == "kv_channels" else ours
            yield f"{name}={value!r}, and the model has {field}={mine!r}"


def _rope(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    return theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}


def _tensors(folder: Path) -> dict[str, Tensor]:
    names = [folder / name for name in _WHOLE if (folder / name).is_file()][:1]
    for index in _INDEXED:
        if not names and (folder / index).is_file():
            names = sorted({folder / file for file in _json(folder / index)["weight_map"].values()})
    if not names:
        raise ValueError(
            f"{folder} has none of {', '.join((*_WHOLE, *_INDEXED))}: give a folder that"
            " LlamaForCausalLM.save_pretrained has written"
        )
    tensors: dict[str, Tensor] = {}
    for file in names:
        tensors |= _of_file(file)
    return tensors


def _of_file(file: Path) -> dict[str, Tensor]:
    """Tensors of a file, which are read when they are used."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except ImportError as error:
        raise ValueError(
            f"{file} needs the package safetensors: pip install safetensors"
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {reason})") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a mapping")
    return content
