"""YAML files that ship in a folder of the package, by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Shelf:
    """The YAML files of one folder. The first line of each is a comment that describes it.

    Attributes:
        package: the folder, as a package that can be imported.
    """

    package: str

    def names(self) -> list[str]:
        """Names of the files in order, without `.yaml`."""
        paths = (Path(str(item)) for item in files(self.package).iterdir())
        return sorted(path.stem for path in paths if path.suffix == ".yaml")

    def path(self, name: str) -> Path:
        """The file that has one of `names`."""
        return Path(str(files(self.package).joinpath(f"{name}.yaml")))

    def description(self, name: str) -> str:
        """What the first line of a file says: one sentence."""
        with self.path(name).open() as file:
            return file.readline().removeprefix("#").strip()

    def hint(self, name: str) -> str:
        """`; did you mean 'x'?` for a name that is nearly one of `names`, or nothing."""
        close = difflib.get_close_matches(name, self.names(), n=1)
        return f"; did you mean '{close[0]}'?" if close else ""
