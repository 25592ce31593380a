"""The order of a model's parameters, of which ranks have some each."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"(local_experts\.)(\d+)\.")


def in_order(names: Sequence[str]) -> list[str]:
    """Names of parameters in the order of the model, each once.

    Within a layer they stay in the order in which they come, but experts go by their numbers.
    """
    places: dict[str, int] = {}
    for name in names:
        places.setdefault(_container(name), len(places))
        places.setdefault(_anonymous(name), len(places))

    def key(name: str) -> tuple[int, ...]:
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        if layer is None:
            return (0 if "embedding." in name else 2, places[_anonymous(name)])
        number = -1 if expert is None else int(expert[2])
        return (1, int(layer[1]), places[_container(name)], number, places[_anonymous(name)])

    return sorted(dict.fromkeys(names), key=key)


def _anonymous(name: str) -> str:
    """A name without the numbers of its layer and its expert."""
    return _EXPERT.sub(r"\1.", _LAYER.sub("layers.", name))


def _container(name: str) -> str:
    """Where an expert is; of all others the name."""
    expert = _EXPERT.search(name)
    return _anonymous(name if expert is None else name[: expert.end(1)])
