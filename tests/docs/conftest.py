"""One folder in which the commands and scripts of all pages run, each of them once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_dhellam.commands.main import main

STARTS_PROCESSES = ("demo", "search", "fit", "validate", "test", "predict")


class Workshop:
    """Runs what pages show, in one folder; what was run already is not run again.

    Attributes:
        folder: where the commands run.
        printed: by command, what it wrote to standard output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.printed: dict[str, str] = {}

    def run(self, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
        """Run `dhellam …`. Gives what it prints."""
        command = " ".join(words)
        if command not in self.printed:
            assert words[0] == "dhellam", f"{command}: only commands of ours are run"
            starts = words[1] in STARTS_PROCESSES and "--print_config" not in words
            runs = self._alone if starts else self._here
            self.printed[command] = runs(list(words[1:]), capsys)
        return self.printed[command]

    def script(self, text: str, processes: int = 1) -> str:
        """Run a Python script in a process of its own, or in several that torchrun starts."""
        (self.folder / "script.py").write_text(text)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        start = launcher if processes > 1 else ["-W", "ignore"]
        return self._process([sys.executable, *start, "script.py"])

    def script_here(self, text: str) -> None:
        """Run a Python script that starts no process in this one, which has imported the rest."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            exec(compile(text, "script.py", "exec"), {"__name__": "__main__"})

    def _alone(self, words: list[str], _: object) -> str:
        return self._process([sys.executable, "-W", "ignore", "-m", "lightning_dhellam", *words])

    def _process(self, command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _here(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            try:
                code = main(words)
            except SystemExit as end:
                code = end.code
        said = capsys.readouterr()
        assert code == 0, said.out + said.err
        return said.out


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The folder that all tests of pages share."""
    return Workshop(tmp_path_factory.mktemp("workshop"))
