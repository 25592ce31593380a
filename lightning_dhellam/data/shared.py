"""What one rank makes on disk, and the others read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lightning_dhellam.files import staged_directory
from lightning_dhellam.parallel.stand_in import is_emulated


def make_once(cache: Path, write: Callable[[Path], None], *, what: str) -> None:
    """Have the first rank make a folder that is not there, whole or not at all.

    Collective when torch.distributed is initialised: the others wait, so the folder must be visible
    to all. A rank that is alone, since its cluster is emulated, makes it whatever its number.

    Args:
        cache: the folder.
        write: fills another one, which becomes it.
        what: it is, in messages.

    Raises:
        ValueError: it cannot be written.
        RuntimeError: on the others, if the first has failed.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    distributed = distributed and not is_emulated()
    try:
        if not cache.is_dir() and (not distributed or torch.distributed.get_rank() == 0):
            with staged_directory(cache) as folder:
                write(folder)
    except PermissionError as error:
        raise ValueError(
            f"{cache.parent} cannot be written ({error.strerror})."
            " Give cache_dir=<a directory that every rank can read and rank 0 can write>."
        ) from error
    finally:
        if distributed:
            torch.distributed.barrier()
    if not cache.is_dir():
        raise RuntimeError(
            f"{cache} is missing: rank 0 could not build the {what} (see its error), or cache_dir"
            " is not on storage that all ranks share."
        )
