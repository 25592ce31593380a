"""Every script of the README and the guides runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.conftest import Workshop
from tests.docs.pages import PAGES, README, Block, blocks, name
from tests.docs.test_commands import DATA

SCRIPTS = [block for page in PAGES for block in blocks(page, "python")]
LOSS = '\n    print("loss", float(trainer.callback_metrics["train_loss"]))\n'
"""Added to the README's script, whose progress bar shows it to a user."""


def processes(script: Block) -> int:
    """How many the page starts with torchrun; 1 where the script is run as it is."""
    starts = [words for block in blocks(script.page, "sh") for words in block.commands]
    counts = [int(words[2]) for words in starts if words[:2] == ["torchrun", "--nproc-per-node"]]
    return counts[0] if counts else 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda block: name(block.page))
def test_the_script_runs(
    script: Block, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.reason is None, "every script runs here"
    workshop.run(DATA, capsys)
    if script.page == README:
        said = workshop.script(script.text.rstrip("\n") + LOSS)
        losses = [float(loss) for loss in re.findall(r"^loss ([\d.]+)$", said, re.MULTILINE)]
        assert losses and max(losses) < 7.5, "it starts at ln(4096) = 8.3"
    elif processes(script) > 1:
        workshop.script(script.text, processes(script))
    else:
        workshop.script_here(script.text)


def test_the_readme_has_one_script_with_the_strategy() -> None:
    (script,) = blocks(README, "python")
    assert "DHellamStrategy(" in script.text and "trainer.fit(" in script.text


def test_a_checkpoint_of_the_guide_was_continued(workshop: Workshop) -> None:
    folder: Path = workshop.folder / "runs/checkpoints"
    if not folder.exists():
        pytest.skip("the script of docs/guides/checkpoints.md was not run before")
    assert [path.name for path in sorted(folder.glob("*/*.ckpt"))] == [
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
    ]
