"""Choices of what backward makes again, by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_dhellam.plan import GraphPair
from lightning_dhellam.plan.by_layer import check_choices, check_keys, choices_of, remade
from tests.plan.real_graphs import lowered

CHUNKS = (0, 0, 1, 2, 3, 3)


@pytest.mark.parametrize(
    ("what", "layers", "head"),
    [
        ("full", ["full"] * 6, ("gathers",)),
        (
            {"0-1": "full", "4-": "none"},
            ["full"] * 2 + ["gathers"] * 2 + ["none"] * 2,
            ("gathers",),
        ),
        ({3: ["act"], "others": "none"}, ["none"] * 3 + [["act"]] + ["none"] * 2, ("none",)),
        (
            {"chunk 0": "full", "chunk 2-4": "none", "head": "full"},
            ["full", "full", "gathers", "none", "none", "none"],
            "full",
        ),
        ({}, ["gathers"] * 6, ("gathers",)),
    ],
)
def test_the_choice_of_each_layer(what: Any, layers: list[Any], head: Any) -> None:
    assert choices_of(what, CHUNKS, 5) == (*layers, head)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"hed": "full"}, r"a choice for 'hed', which is no layer: .* did you mean 'head'\?"),
        ({"other": "full"}, r"did you mean 'others'\?"),
        ({"chunk0": "full"}, r"did you mean 'chunk 0'\?"),
        ({"0-6": "full"}, r"a choice for '0-6', but the model has layers 0 to 5: use some of"),
        ({"3-2": "full"}, r"a choice for '3-2', .* the lower number first"),
        ({"chunk 4": "full"}, r"a choice for 'chunk 4', but the model has chunks 0 to 3"),
        ({"0-3": "full", 3: "none"}, r"names layer 3 by '0-3' and by '3': let one of them leave"),
        ({"chunk 1": "full", "2": "none"}, r"names layer 2 by 'chunk 1' and by '2'"),
    ],
)
def test_keys_that_cannot_be_are_refused(what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choices_of(what, CHUNKS, 4)


def test_values_are_choices_and_slots() -> None:
    check_choices({"0-3": "full", "4-": ["act", "gathers"]}, {"act"})
    with pytest.raises(ValueError, match=r"names 'ful', which no layer has.*mean 'full'\?"):
        check_choices({"0-3": "ful"}, {"act"})
    check_keys("full")
    check_keys({"4-": "full", 3: "none", "chunk 1-2": "none", "head": "none", "others": "none"})


def test_graphs_are_called_by_what_they_make_again() -> None:
    def names(ranks: int, what: Any) -> list[str]:
        return [str(pair.backward) for pair in lowered(ranks, recompute=what).layers]

    assert names(2, "gathers") == [
        "embedding backward",
        "transformer backward",
        "transformer backward",
        "head backward",
    ]
    # Nothing is gathered on one rank, so that there `none` is no other kind.
    assert names(1, "none") == names(2, "gathers")
    assert names(2, {0: "none", 1: ["gathers", "rotated"], "head": "none"})[1:] == [
        "transformer+none backward",
        "transformer+gathers+rotated backward",
        "head+none backward",
    ]


def test_a_layer_is_told_from_all_that_save_other_slots() -> None:
    kept = lowered(2, recompute="none").layers[1]
    plain = GraphPair(*(replace(g, name="transformer") for g in (kept.forward, kept.backward)))
    kinds: dict[str, GraphPair] = {}
    for what in ("none", "gathers", "selective", "full", ["act"], ["gathers", "mid"]):
        pair = remade(plain, what)
        assert (pair.forward.name == "transformer") == (what == "gathers")
        kinds[pair.forward.fingerprint] = pair
    assert len(kinds) == 6 and len({pair.saved for pair in kinds.values()}) == 6
