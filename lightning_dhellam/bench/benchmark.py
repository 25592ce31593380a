"""What every benchmark is: a name, options, and a run that returns a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from lightning_dhellam.bench.report import Report
from lightning_dhellam.files import check_folder
from lightning_dhellam.values import plainly

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Benchmark(Generic[Settings]):
    """A benchmark as a command offers it.

    Attributes:
        name: The word that it is called by.
        description: What it measures, in one line.
        settings: A dataclass whose fields are the options of the command. It raises `ValueError`
            for values that cannot be measured.
        run: Measures with such settings and writes its files into a folder. What fails is a row of
            the report that says so.
    """

    name: str
    description: str
    settings: type[Settings]
    run: Callable[[Settings, Path], Report]

    def parse(self, program: str, words: Sequence[str]) -> tuple[Settings, Path]:
        """The settings, and the folder for files, that a user has typed.

        Args:
            program: How the user called the command, for its help.
            words: The options as they were typed.

        Raises:
            ValueError: There is no such option, or its value cannot be measured.
            SystemExit: Help was asked for.
        """
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        parser = ArgumentParser(prog=program, description=self.description, exit_on_error=False)
        parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="files go here")
        parser.add_class_arguments(self.settings)
        try:
            options = vars(parser.parse_args(list(words)))
        except ArgumentError as error:
            known = [name for action in parser._actions for name in action.option_strings]
            raise ValueError(plainly(str(error), known)) from None
        folder = Path(options.pop("output"))
        return self.settings(**options), folder

    def command(self, program: str, words: Sequence[str]) -> int:
        """Measure with the options in `words`, print the table and write the files.

        Args:
            program: How the user called the command, for its help.
            words: The options as they were typed.

        Returns:
            The exit code: 1 if a row failed.

        Raises:
            ValueError: An option has a value that cannot be measured.
        """
        settings, folder = self.parse(program, words)
        check_folder(folder, f"--output {folder}")
        report = self.run(settings, folder)
        if os.environ.get("RANK", "0") != "0":
            return 0  # of several processes that torchrun has started, the first one writes
        print(report.table())
        print(f"written to {report.save(folder)}")
        return 1 if report.failures else 0
