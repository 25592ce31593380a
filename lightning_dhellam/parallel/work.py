"""What runs until it is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol

import torch


class Work(Protocol):
    """Something that runs until it is waited for."""

    def wait(self) -> Any:
        """Return when it is done."""

    def is_completed(self) -> bool:
        """Whether it is known to be done."""


class Once:
    """Works as one, which are waited for once: a gloo transfer takes it ill to be asked again.

    Args:
        works: such as the sends and receives of an exchange.
        finish: what is to be done when they are done; whoever waits first does it.
    """

    def __init__(self, works: Sequence[Work], finish: Callable[[], None] | None = None) -> None:
        self._works = list(works)
        self._finish = finish
        self._failure: Exception | None = None
        self._done = False
        self._lock = Lock()

    def wait(self) -> None:
        """Return when all is done. Any thread may wait; what fails, fails for all of them."""
        with self._lock:
            if not self._done:
                try:
                    self._complete()
                except Exception as error:
                    self._failure = error
                self._done = True
            if self._failure is not None:
                raise self._failure

    def _complete(self) -> None:
        while self._works:
            self._works.pop(0).wait()
        if self._finish is not None:
            with torch.no_grad():
                self._finish()
            self._finish = None

    def is_completed(self) -> bool:
        """Whether it was waited for."""
        return self._done
