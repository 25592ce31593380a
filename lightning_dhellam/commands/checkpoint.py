"""`dhellam checkpoint show`: what a checkpoint is, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_dhellam.checkpoint.summary import Summary, summarise
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.files import size_in_words
from lightning_dhellam.remote import Folder, place_of


def checkpoint_command(argv: Sequence[str]) -> int:
    """Run `dhellam checkpoint <argv>`. Returns the exit code.

    Raises:
        ValueError: a checkpoint is none, or not whole: a file is missing, cut off or changed.
    """
    parser = Parser(prog="dhellam checkpoint", description="Look at checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="show")
    show = commands.add_parser(
        "show",
        help="what a checkpoint is, and whether it is whole",
        description="Print what a checkpoint is. Every file is read to its end and compared with"
        " the checksum that was written.",
    )
    show.add_argument("folder", type=place_of, nargs="+", help="folder of a checkpoint")
    for number, folder in enumerate(parser.parse_args(argv).folder):
        print("\n" * bool(number) + "\n".join(_lines(folder, summarise(folder))))
    return 0


def _lines(folder: Folder, found: Summary) -> Iterator[str]:
    size = size_in_words(found.bytes)
    yield f"{folder}: whole, {found.files} files, {size}, format {found.version}"
    samples = "" if found.samples is None else f", {found.samples:,} samples"
    yield f"  step {found.step:,}, epoch {found.epoch}{samples}"
    types = ", ".join(found.types)
    yield f"  weights: {found.values:,} numbers in {found.weights} tensors, {types}"
    if found.settings:
        settings = ", ".join(f"{name}={value}" for name, value in found.settings.items())
        yield f"  optimizer: {size_in_words(found.state)} of state; {settings}"
    else:
        yield "  optimizer: none, weights only"
    sizes = ", ".join(f"{name}={value}" for name, value in found.sizes.items())
    yield f"  written by {f'a run with {sizes}' if sizes else 'one process'}"
    yield f"  made by Lightning {found.made_by}"
    if found.origin is not None:
        yield f"  weights from {found.origin}"
