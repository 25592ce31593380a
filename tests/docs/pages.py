"""What the documentation shows: fenced blocks, commands in running text, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *GUIDES]
_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: that shows it.
        language: behind the fence.
        text: what is in it.
        reason: why it is not run, from the comment above it; None if it is.
    """

    page: Path
    language: str
    text: str
    reason: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line, without its comment."""
        lines = (shlex.split(line, comments=True) for line in self.text.splitlines())
        return [words for words in lines if words]


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language, in order."""
    found = (Block(page, m["language"], m["text"], m["reason"]) for m in fences(page))
    return [block for block in found if block.language == language]


def fences(page: Path) -> list[re.Match[str]]:
    """Every fenced block of a page whose language is named."""
    return list(_FENCE.finditer(page.read_text()))


def inline_commands(page: Path) -> list[list[str]]:
    """Commands in running text and in tables: `dhellam …`, `make …` and the like in backticks."""
    text = _FENCE.sub("", page.read_text())
    found = re.findall(r"`((?:dhellam|make|pip install|torchrun) [^`\n]*(?:\n[^`\n]+)?)`", text)
    return [shlex.split(command) for command in found]


def name(page: Path) -> str:
    """What a test calls a page."""
    return str(page.relative_to(ROOT))
