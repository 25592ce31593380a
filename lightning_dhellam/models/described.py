"""The `config.json` of a model, which transformers 4 and 5 both read.

They have the rotary embedding and the type of the weights in different places, so both are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families import Family
from lightning_dhellam.models.families.family import SLIDING, WHOLE
from lightning_dhellam.models.families.rope import LONG, ORIGINAL, rope_of, rope_told, rope_type
from lightning_dhellam.models.source import CONFIG, check_config, read_config

_LEFT_OUT = ("auto_map", "_name_or_path", "quantization_config")
"""What is true of the folder of origin only: its code, its path."""


def config_json(
    config: ModelConfig, family: Family, origin: Path | None, kind: str
) -> dict[str, Any]:
    """What `config.json` of an exported model holds.

    Args:
        config: of the model.
        family: that it is of.
        origin: the folder that its weights are from. What it says is kept, if it is still true.
        kind: type of the weights that are written.

    Raises:
        ValueError: the model cannot be described from its `ModelConfig` alone.
    """
    found = _of_origin(config, family, origin) or _made(config, family)
    found = {name: value for name, value in found.items() if name not in _LEFT_OUT}
    found |= {"architectures": [family.architecture], "dtype": kind, "torch_dtype": kind}
    if config.position_embedding == "rope":
        found |= _rope(found, config.rotary_base, family)
    return found


def _of_origin(config: ModelConfig, family: Family, origin: Path | None) -> dict[str, Any] | None:
    if origin is None or not (origin / CONFIG).is_file():
        return None
    try:
        found = dict(read_config(origin))
        check_config(found, config, family)
    except ValueError:  # the model was changed since
        return None
    return found


def _made(config: ModelConfig, family: Family) -> dict[str, Any]:
    rope = rope_told(config)
    # Transformers scales by `dynamic` what is longer than this.
    is_dynamic = rope["rope_type"] == "dynamic"
    longest = config.rope_original_length if is_dynamic else config.max_sequence_length
    found = {
        **{name: value for name, value in family.only.items() if value is not None},
        **{name: getattr(config, ours) for ours, (name, _) in family.fields.items()},
        "model_type": family.model_type,
        "head_dim": config.kv_channels,
        "max_position_embeddings": longest,
        "initializer_range": config.init_std,
        **({"rope_parameters": rope} if config.position_embedding == "rope" else {}),
        **_windows(config, family),
        **family.tells(config),
    }
    try:
        check_config(found, config, family)
    except ValueError as error:
        raise ValueError(
            f"config.json of a {family.architecture} cannot be made of this model alone ({error}):"
            " give the folder that it is from as origin"
        ) from error
    return found


def _windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The windows of layers, of a family that may have some."""
    if "sliding_window" in family.fixed:
        return {}
    here = [window is not None for window in config.windows]
    found = {
        "sliding_window": config.sliding_window if any(here) else None,
        "use_sliding_window": any(here),
    }
    if "window_layers" in family.fixed:
        return found
    return found | {
        "max_window_layers": here.index(True) if any(here) else config.num_layers,
        "layer_types": [SLIDING if one else WHOLE for one in here],
    }


def _rope(theirs: dict[str, Any], base: float, family: Family) -> dict[str, Any]:
    """The rotary embedding where transformers 5 looks for it, and where 4 does."""
    rope = {name: value for name, value in rope_of(theirs).items() if name != "type"}
    kind, partial = rope_type(rope_of(theirs)), "partial_rotary_factor"
    rope |= {"rope_type": kind, "rope_theta": base}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    known = (partial, ORIGINAL) if kind == LONG else (partial,)
    beside = {name: rope[name] for name in known if name in rope}
    return beside | {
        "rope_parameters": rope,
        "rope_theta": base,
        "rope_scaling": None if kind == "default" else family.in_4(scaling),
    }
