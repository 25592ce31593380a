"""Python looks for no garbage while commands and public names are loaded, and then goes on."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest

import lightning_dhellam
from lightning_dhellam.commands import main
from lightning_dhellam.importing import uncollected


def test_python_looks_again_afterwards_whatever_happened() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected(), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_who_looks_for_no_garbage_does_not_begin_to() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_commands_and_public_names_are_loaded_so(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []

    class Loaded:
        LanguageModel = None

        @staticmethod
        def shelf_command(words: list[str]) -> int:
            looked.append(gc.isenabled())
            return 0

    def load(name: str) -> Any:
        looked.append(gc.isenabled())
        return Loaded

    monkeypatch.setattr(main, "import_module", load)
    monkeypatch.setattr(lightning_dhellam, "import_module", load)
    assert main.main(["recipes"]) == 0
    lightning_dhellam.LanguageModel  # noqa: B018
    assert looked == [False, True, False]


@pytest.mark.parametrize("count", [1, 1000])
def test_what_many_imports_have_made_is_not_looked_through_again(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(count))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    with uncollected():
        sys.modules |= {f"module {number}": sys for number in range(count)}
    assert frozen == [1000] * (count == 1000)
