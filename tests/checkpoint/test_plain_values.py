"""What an optimizer keeps of parameters and is no part of them: once for all that have the same."""

from __future__ import annotations

from typing import Any

import torch

from lightning_dhellam.checkpoint.stepped import merged, values_of


def _rest(**values: Any) -> dict[str, Any]:
    return {"groups": [], "values": values, "other": {}, "alone": []}


def test_those_that_are_the_same_are_kept_once_and_read_for_each() -> None:
    values: dict[str, Any] = {
        **{name: {"step": torch.tensor(3.0), "rate": 0.5} for name in "abc"},
        "d": {"step": torch.tensor(4.0), "rate": 0.5},
        "e": {"step": torch.tensor(4), "rate": 0.5},
        "f": {"step": torch.tensor([4]), "rate": 0.5},
        "g": {"step": 4, "rate": 0.5},
        "h": {"step": True, "rate": 0.5},
        "i": {},
        "j": {},
    }
    first = {name: values.pop(name) for name in "ab"}
    found = merged([_rest(**first), _rest(**values)])
    assert [one["names"] for one in found["alike"]] == [[*"abc"], *map(list, "defgh"), [*"ij"]]
    read = values_of(found)
    assert read == {**first, **values}
    types = [type(own.get("step")) for own in read.values()]
    assert types == [*[torch.Tensor] * 6, int, bool, *[type(None)] * 2]
    read["a"]["step"] += 1
    assert [float(read[name]["step"]) for name in "abc"] == [4.0, 3.0, 3.0]


def test_those_of_before_were_kept_for_each() -> None:
    before = _rest(a={"step": 1}, b={})
    assert values_of(before) == {"a": {"step": 1}, "b": {}}
