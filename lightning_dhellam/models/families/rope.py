"""What a configuration of Hugging Face says of rotary embedding, and how it is said.

Transformers 5 has all of it in `rope_parameters`, 4 the base and the scaling apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log, sqrt
from typing import Any

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.rotary_fields import LLAMA_3, SCALINGS

Theirs = Mapping[str, Any]
"""What a `config.json` holds."""

Found = dict[str, tuple[str, Any]]
"""By a `ModelConfig`'s names: Hugging Face's name of a value, and the value."""

LONG = "longrope"
"""Scaling by a factor for each frequency."""

ORIGINAL = "original_max_position_embeddings"
"""Tokens of the sequences that a model was trained on first; said beside the scaling as well."""


def rope_of(theirs: Theirs) -> Theirs:
    """What a configuration of transformers 5 or 4 says of its rotary embedding."""
    return theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}


def rope_type(rope: Theirs) -> str:
    """The scaling of rotary frequencies, by its name in Hugging Face."""
    kind: str = rope.get("rope_type", rope.get("type", "default")) or "default"
    # The first files of Phi-3 have other names for it.
    return LONG if kind == "su" or (kind == "yarn" and "short_factor" in rope) else kind


def rope_found(theirs: Theirs, base: float) -> Found:
    """What a configuration says of the fields of `RotaryFields`; `base` where it names none."""
    rope = rope_of(theirs)
    kind, theta = rope_type(rope), rope.get("rope_theta", theirs.get("rope_theta"))
    scaled, partial = kind in SCALINGS, "partial_rotary_factor"
    found: Found = {
        "rotary_base": ("rope_theta", base if theta is None else theta),
        "rotary_fraction": (partial, rope.get(partial, theirs.get(partial, 1.0))),
        "rope_scaling": ("rope_type", kind if scaled else "llama3"),
        "rope_scaling_factor": (
            f"factor of rope_type {kind if scaled else 'llama3'!r}",
            _factor(theirs, rope) if scaled else None,
        ),
        "rope_short_factors": ("short_factor", _kept(rope, "short_factor", kind)),
        "rope_long_factors": ("long_factor", _kept(rope, "long_factor", kind)),
        "rope_original_length": (ORIGINAL, _original(theirs, rope)),
        "magnitude": ("attention_factor", _magnitude(theirs, rope)),
    }
    if kind == "dynamic":
        found["rope_original_length"] = "max_position_embeddings", _longest(theirs)
    if kind == "yarn":
        found["rope_beta_fast"] = "beta_fast", float(rope.get("beta_fast") or 32)
        found["rope_beta_slow"] = "beta_slow", float(rope.get("beta_slow") or 1)
        found["rope_truncate"] = "truncate", bool(rope.get("truncate", True))
    return found


def rope_told(own: ModelConfig) -> dict[str, Any]:
    """What transformers 5 says of the rotary embedding of a model."""
    factor, kind = own.rope_scaling_factor, own.rope_scaling
    told: dict[str, Any] = {"rope_type": "default", "rope_theta": own.rotary_base}
    if factor is not None:
        told |= {"rope_type": kind, "factor": factor}
        told |= LLAMA_3 if kind == "llama3" else {}
    elif own.rope_short_factors is not None and own.rope_long_factors is not None:
        told["rope_type"] = kind = LONG
        told["short_factor"] = list(own.rope_short_factors)
        told["long_factor"] = list(own.rope_long_factors)
    if told["rope_type"] in ("yarn", LONG):
        told |= {ORIGINAL: own.rope_original_length, "attention_factor": own.magnitude}
    if told["rope_type"] == "yarn":
        told |= {"beta_fast": own.rope_beta_fast, "beta_slow": own.rope_beta_slow}
        told["truncate"] = own.rope_truncate
    if own.rotary_fraction != 1.0:
        told["partial_rotary_factor"] = own.rotary_fraction
    return told


def long_magnitude(factor: float, original: int) -> float:
    """The factor by which queries and keys grow with `longrope`, unless that is said."""
    return 1.0 if factor <= 1 or original <= 1 else sqrt(1 + log(factor) / log(original))


def _longest(theirs: Theirs) -> int | None:
    return theirs.get("max_position_embeddings")


def _original(theirs: Theirs, rope: Theirs) -> int | None:
    """Tokens of the sequences that it was trained on first, where its scaling looks at them."""
    if rope_type(rope) not in ("yarn", LONG):
        return None
    # What is said beside the scaling comes first, as in transformers.
    found: int | None = theirs.get(ORIGINAL) or rope.get(ORIGINAL) or _longest(theirs)
    return found


def _factor(theirs: Theirs, rope: Theirs) -> float | None:
    factor, original, longest = rope.get("factor"), _original(theirs, rope), _longest(theirs)
    if factor is None and original and longest:
        return longest / original
    return None if factor is None else float(factor)


def _kept(rope: Theirs, name: str, kind: str) -> tuple[float, ...] | None:
    factors = rope.get(name) if kind == LONG else None
    return None if factors is None else tuple(map(float, factors))


def _magnitude(theirs: Theirs, rope: Theirs) -> float:
    """The factor by which queries and keys grow where they turn."""
    kind, given = rope_type(rope), rope.get("attention_factor")
    if kind not in ("yarn", LONG):
        return 1.0
    factor = _factor(theirs, rope) or 1.0
    if given is not None or factor <= 1:
        return 1.0 if given is None else float(given)
    if kind == LONG:
        return long_magnitude(factor, _original(theirs, rope) or 1)
    over: Any = rope.get("mscale")
    under: Any = rope.get("mscale_all_dim")
    if not over or not under:
        over, under = 1.0, 0.0
    return (0.1 * over * log(factor) + 1) / (0.1 * under * log(factor) + 1)
