"""What backward makes again, layer by layer: of which layers a choice of `plan.passes` is.

A mapping has a choice for numbers of layers, of chunks of a pipeline, or for the head; what it does
not name has the choice of `others`, or else the usual one:

    {"0-3": full, "4-": selective}
    {"chunk 0": full, "head": none, "others": [gathers, act]}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lightning_dhellam.nearest import suggestion
from lightning_dhellam.plan.graph import GraphPair, called
from lightning_dhellam.plan.passes import Recompute, check_recompute, chosen, of_head, recompute

ByLayer = Mapping[str | int, Recompute]
"""A choice by what it is for: `7`, `0-3`, `4-`, `chunk 0`, `chunk 2-3`, `head` or `others`."""

AUTO = "auto"
"""In place of a choice, one is made: what fits into memory at the least time."""

USUAL = "gathers"
"""The choice where nothing is said."""

HEAD = "head"
"""What the head is called."""

_OTHERS, _CHUNK = "others", "chunk "
_RANGE = re.compile(r"(chunk )?(\d+)(-(\d*))?")


def choices_of(
    what: Recompute | ByLayer, chunks: Sequence[int], count: int = 1
) -> tuple[Recompute, ...]:
    """The choice of each layer of a model, and behind them that of its head.

    Args:
        what: a choice for all of them, or by layer.
        chunks: the chunk of the pipeline that each layer is part of.
        count: how many chunks there are; some may have no layer.

    Raises:
        ValueError: a key is none, names what there is not, or what another one has named.
    """
    check_keys(what)
    if not isinstance(what, Mapping):
        return (*(what,) * len(chunks), of_head(what))
    named: dict[int, str] = {}
    for key in map(str, what):
        for layer in _layers(key, chunks, count):
            if layer in named:
                which = f"layer {layer}" if layer < len(chunks) else "the head"
                raise ValueError(
                    f"recompute names {which} by '{named[layer]}' and by '{key}': let one of them"
                    " leave it out"
                )
            named[layer] = key
    values = {str(key): one for key, one in what.items()}
    others = values.get(_OTHERS, USUAL)
    layers = (values[named[i]] if i in named else others for i in range(len(chunks)))
    return (*layers, values[HEAD] if HEAD in values else of_head(others))


def check_choices(what: Recompute | ByLayer, slots: Collection[str]) -> None:
    """Refuse what is neither a choice nor one of the slots that layers have.

    Raises:
        ValueError: with the nearest name.
    """
    for one in what.values() if isinstance(what, Mapping) else (what,):
        check_recompute(one, slots)


def keeps_most(what: Recompute | ByLayer) -> bool:
    """Return whether backward makes nothing again, in any layer, but what ranks gather."""
    every = what.values() if isinstance(what, Mapping) else (what,)
    names = (one for each in every for one in ((each,) if isinstance(each, str) else each))
    return all(name in ("none", USUAL) for name in names)


def remade(pair: GraphPair, what: Recompute) -> GraphPair:
    """The same layer with what a choice makes again.

    Its graphs are called by the choice as well, unless it comes to the usual one: layers that
    make other slots again are of another kind.
    """
    usual = recompute(pair, chosen(pair, USUAL))
    made = recompute(pair, chosen(pair, what))
    if made.backward.fingerprint == usual.backward.fingerprint:
        return usual
    name = called(pair.name, *((what,) if isinstance(what, str) else what))
    return GraphPair(replace(made.forward, name=name), replace(made.backward, name=name))


def check_keys(what: Recompute | ByLayer) -> None:
    """Refuse keys that name nothing in any model.

    Raises:
        ValueError: with the nearest one.
    """
    for key in map(str, what) if isinstance(what, Mapping) else ():
        if key in (HEAD, _OTHERS) or _RANGE.fullmatch(key):
            continue
        raise ValueError(
            f"recompute has a choice for '{key}', which is no layer: use numbers of layers such as"
            f" '7', '0-3' or '4-', of chunks such as '{_CHUNK}0', '{HEAD}' or '{_OTHERS}'"
            + suggestion(key, (HEAD, _OTHERS, f"{_CHUNK}0"))
        )


def _layers(key: str, chunks: Sequence[int], count: int) -> Sequence[int]:
    """The layers that a key names; the head is the one behind the last."""
    match = _RANGE.fullmatch(key)
    if match is None:
        return [len(chunks)] if key == HEAD else []
    of_chunk, first, ending, end = match.groups()
    last = (count if of_chunk else len(chunks)) - 1
    low = int(first)
    high = low if ending is None else int(end) if end else last
    if not low <= high <= last:
        kind = "chunks" if of_chunk else "layers"
        raise ValueError(
            f"recompute has a choice for '{key}', but the model has {kind} 0 to {last}: use some of"
            " these, the lower number first"
        )
    named = range(low, high + 1)
    return [i for i, chunk in enumerate(chunks) if chunk in named] if of_chunk else named
