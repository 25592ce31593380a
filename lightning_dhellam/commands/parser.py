"""A parser of command lines that says a mistake in one line, with the nearest option."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from typing_extensions import override

from lightning_dhellam.values import plainly


class Parser(argparse.ArgumentParser):
    """argparse's, without the usage of the whole command in front of a mistake.

    Options are not shortened: what was meant is said instead.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    @override
    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        known = [name for action in self._actions for name in action.option_strings]
        line = plainly(message, known)
        self.exit(2, f"{self.prog}: error: {line} ('{self.prog} --help' lists the options)\n")
