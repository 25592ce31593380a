"""The part of a model's shape that says how positions turn its heads, checked."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

SCALINGS = ("llama3", "linear", "dynamic", "yarn")
"""Of rotary frequencies by one factor, by Hugging Face's names (`rope_type`)."""

LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Constants of the scaling of Llama 3, of which only the factor can be expressed here."""

_BY_LENGTH = ("dynamic", "yarn")
"""Those that know how long the sequences were that the model was trained on first."""


@dataclass(frozen=True, kw_only=True)
class RotaryFields:
    """What a `ModelConfig` says of its rotary position embedding."""

    rotary_base: float = 500_000.0
    """Base period of the rotary position embedding (Hugging Face: rope_theta)."""

    rotary_fraction: float = 1.0
    """Share of a head's channels that turn, the first ones (Hugging Face:
    partial_rotary_factor)."""

    rope_scaling: str = "llama3"
    """How rotary frequencies are scaled by `rope_scaling_factor`: `llama3`, `linear`, which divides
    them all, `dynamic`, which raises their base for sequences longer than `rope_original_length`,
    or `yarn` (arXiv 2309.00071), which divides the slow ones (Hugging Face: rope_type)."""

    rope_scaling_factor: float | None = None
    """Scaling of the rotary frequencies (8 for Llama 3.1, 32 for 3.2); off when left out. The other
    constants of Llama 3 are the family's own: low 1, high 4, original context 8192."""

    rope_short_factors: tuple[float, ...] | None = None
    """Divide the rotary frequencies of sequences of at most `rope_original_length` tokens, a number
    for each pair of channels that turn (Hugging Face: short_factor of longrope); off if left
    out."""

    rope_long_factors: tuple[float, ...] | None = None
    """Divide those of longer sequences (Hugging Face: long_factor)."""

    rope_original_length: int | None = None
    """Tokens of the sequences that the model was trained on first, with these factors, `dynamic` or
    `yarn` (Hugging Face: original_max_position_embeddings)."""

    rope_magnitude: float | None = None
    """Multiplies channels of queries and keys where they turn (Hugging Face: attention_factor,
    short_mscale). When left out, 0.1 ln(rope_scaling_factor) + 1 with `yarn`, and 1 without."""

    rope_beta_fast: float = 32.0
    """Turns over `rope_original_length` from which on `yarn` leaves a frequency as it is."""

    rope_beta_slow: float = 1.0
    """Turns up to which it divides one by the whole factor."""

    rope_truncate: bool = True
    """Whether the channels between these are counted from a whole number to a whole number."""

    @property
    def magnitude(self) -> float:
        """Factor on channels of queries and keys that turn."""
        if self.rope_magnitude is not None:
            return float(self.rope_magnitude)
        if self.rope_scaling_factor is None or self.rope_scaling != "yarn":
            return 1.0
        return 0.1 * log(self.rope_scaling_factor) + 1.0

    def turning(self, width: int) -> int:
        """How many channels of a head of `width` turn."""
        return int(width * self.rotary_fraction)

    def check_rotary(self, position_embedding: str, width: int) -> None:
        """Refuse what does not fit together, with heads of `width`.

        Raises:
            ValueError: naming the field.
        """
        if position_embedding == "rope":
            self._check_width(width)
            self._check_factor(width)
            self._check_long(width)
            return
        for name, given in {
            "rope_scaling_factor": self.rope_scaling_factor is not None,
            "rope_short_factors": self.rope_short_factors is not None,
            "rope_long_factors": self.rope_long_factors is not None,
            "rope_original_length": self.rope_original_length is not None,
            "rope_magnitude": self.magnitude != 1.0,
            "rotary_fraction": self.rotary_fraction != 1.0,
        }.items():
            if given:
                raise ValueError(
                    f"{name}={getattr(self, name)} with position_embedding={position_embedding!r}:"
                    " there is no rotary embedding to scale; leave it out"
                )

    def _check_width(self, width: int) -> None:
        if width % 2:
            raise ValueError(
                f"head_dim={width} is odd, but rotary embeddings turn pairs: make it "
                f"even (left out, it is hidden_size / num_attention_heads)"
            )
        turning = self.turning(width)
        if not 0 < self.rotary_fraction <= 1 or turning < 2 or turning % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} of head_dim={width} is {turning} channels:"
                " an even number of them turns, at least 2 and at most all"
            )

    def _check_factor(self, width: int) -> None:
        factor, kind = self.rope_scaling_factor, self.rope_scaling
        if kind not in SCALINGS:
            known = " or ".join(map(repr, SCALINGS))
            raise ValueError(f"rope_scaling={kind!r} is not known: use {known}")
        if factor is None:
            if kind != "llama3":
                raise ValueError(f"rope_scaling={kind!r} without rope_scaling_factor: give both")
            return
        if not factor >= 1.0:
            raise ValueError(
                f"rope_scaling_factor={factor} must be at least 1; leave it out "
                f"to switch the scaling off"
            )
        if kind == "dynamic" and self.turning(width) < 4:
            raise ValueError(
                f"rope_scaling='dynamic' with head_dim={width}: its base grows by a power for which"
                " at least 4 channels must turn"
            )
        if kind in _BY_LENGTH and self.rope_original_length is None:
            raise ValueError(
                f"rope_scaling={kind!r} without rope_original_length: give the length, in tokens,"
                " of the sequences that the model was trained on first"
            )
        if not self.rope_beta_fast > self.rope_beta_slow > 0:
            raise ValueError(
                f"rope_beta_fast={self.rope_beta_fast} and rope_beta_slow={self.rope_beta_slow}:"
                " the first must be greater than the second, and that greater than 0"
            )

    def _check_long(self, width: int) -> None:
        """Refuse factors of rotary frequencies that do not fit together."""
        names = ("rope_short_factors", "rope_long_factors")
        given = [name for name in names if getattr(self, name) is not None]
        if given and self.rope_scaling_factor is not None:
            raise ValueError(
                f"rope_scaling_factor={self.rope_scaling_factor} with rope_short_factors: these are"
                " two scalings of the same frequencies; leave one out"
            )
        if self.rope_scaling_factor is not None:
            return
        if self.rope_original_length is not None:
            given.append("rope_original_length")
        if given and len(given) < 3:
            missing = [name for name in (*names, "rope_original_length") if name not in given]
            raise ValueError(
                f"{', '.join(given)} without {', '.join(missing)}: give all three, or none"
            )
        for name in given[:2]:
            factors, pairs = getattr(self, name), self.turning(width) // 2
            if len(factors) != pairs or not all(factor > 0 for factor in factors):
                raise ValueError(
                    f"{name} has {len(factors)} numbers, the least {min(factors, default=None)}: a"
                    f" head of {width} channels needs {pairs} greater than 0"
                )
