"""Starts the processes of a node, as Lightning does, once the configuration is known to be good."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from lightning_dhellam.failures import BOARD, Board, Watch
from lightning_dhellam.strategy.termination import PARENT

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import ClusterEnvironment


class StartedLauncher(_Launcher):
    """Starts nothing: something else has started this process and all others of the job.

    Args:
        prepare: is given the trainer before it runs.
    """

    def __init__(self, prepare: Callable[[pl.Trainer], None]) -> None:
        self._prepare = prepare

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: pl.Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        if trainer is not None:
            self._prepare(trainer)
        return function(*args, **kwargs)

    @override
    def kill(self, signum: Any) -> None:
        """Nobody is left to tell: who has started the others tells them."""


class CheckingLauncher(_SubprocessScriptLauncher):
    """Starts the other processes only after the configuration has been checked in this one.

    Args:
        cluster_environment: of the job.
        num_processes: of this node.
        num_nodes: of the job.
        check: raises what is wrong with a trainer and with the data module and the checkpoint that
            it is to be given.
        prepare: is given the trainer before it runs.

    Attributes:
        board: where ranks agree on who says why the job fails, once there are others.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        check: Callable[[pl.Trainer, Any, Any], None],
        prepare: Callable[[pl.Trainer], None],
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._check = check
        self._prepare = prepare
        self.board: Board | None = None

    @override
    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: pl.Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        if trainer is not None:
            data = next((value for value in args if isinstance(value, LightningDataModule)), None)
            # Each entry of the Trainer has the path at another place.
            named = inspect.signature(function).bind(*args, **kwargs).arguments
            self._check(trainer, data, named.get("ckpt_path"))
            self._prepare(trainer)
        return super().launch(function, *args, trainer=trainer, **kwargs)

    @override
    def _call_children_scripts(self) -> None:
        board = Board.make()
        told = {PARENT: str(os.getpid()), BOARD: board.address}
        os.environ |= told
        try:
            super()._call_children_scripts()
        finally:
            for name in told:
                del os.environ[name]
        if self.procs:
            self.board = board
            Watch(self.procs, board)
