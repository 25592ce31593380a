"""What a search measures on a rank: operators, transfers, and which way of an exchange is best."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dhellam.autosearch.exchanges import Taken, take_fastest
from lightning_dhellam.autosearch.options import Options
from lightning_dhellam.autosearch.profiling import fingerprint, of_stage, routings_of, take_profile
from lightning_dhellam.autosearch.reductions import Reduction
from lightning_dhellam.autosearch.transfers import take_transfers
from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.files import FileError
from lightning_dhellam.hosted import Ending
from lightning_dhellam.parallel.collectives import largest, of_all_ranks, together
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Fingerprint, Profile, Progress


class Measuring:
    """Measures on one rank for a search. Every rank does the same.

    Args:
        runner: that trains.
        pieces: the micro-batches of a step.
        options: how to search.
        ending: tells whether the process is to end, which it then does between two measurements.
        progress: is told of the measurements.
    """

    def __init__(
        self,
        runner: Runner,
        pieces: Sequence[MicroBatch],
        options: Options,
        ending: Ending | None,
        progress: Progress | None,
    ) -> None:
        self._runner = runner
        self._pieces = pieces
        self._options = options
        self._ending = ending
        self._progress = progress

    def profile(self) -> Profile:
        """The profile of the given file, or else a new one. Every rank must call this.

        Raises:
            BenchError: an operator could not be timed; it is named.
            FileError: the given profile was made for something else.
            SIGTERMException: a rank was told to end; on all of them.
        """
        return together(self._profiled, self._runner.context.world_group)

    def anew(self) -> Profile:
        """Measure the operators that there are now, whatever file is given. Every rank must.

        Raises:
            BenchError: an operator could not be timed; it is named.
            SIGTERMException: a rank was told to end.
        """
        engine, everyone = self._runner.engine, self._runner.context.world_group
        profile = take_profile(
            engine,
            self._pieces[0],
            self._made_for,
            group=self._group,
            progress=self._between,
            reduction=Reduction.of(self._runner.gradient_buffers),
            others=routings_of(engine, self._pieces, everyone),
        )
        transfers = take_transfers(engine, self._runner.context, self.tokens)
        return replace(profile, transfers=transfers)

    def exchange(self, slack: float | None) -> Taken:
        """Take the fastest way for keys and values. Every rank must call this.

        `slack` is in bytes, where no limit of memory is given. Raises as `take_fastest` does.
        """
        return take_fastest(
            self._runner,
            self._pieces,
            self.anew,
            tokens=self.tokens,
            memory_limit=self._options.memory_limit,
            memory_slack=slack,
            ending=self.ending_at_once,
        )

    def ending_at_once(self) -> AbstractContextManager[None]:
        """Inside, where no other rank is needed, a rank that is told to end does so at once."""
        return self._ending.ending_at_once() if self._ending is not None else nullcontext()

    @cached_property
    def tokens(self) -> int:
        """Tokens of a micro-batch: ranks may have other batches, but need the same plan."""
        most = torch.tensor([float(self._pieces[0].tokens)])
        return int(largest(most, self._group))

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self._runner.context.stage_group

    @property
    def _made_for(self) -> Fingerprint:
        agreed = self._runner.agreed
        return fingerprint(agreed.engine, self._pieces[0], agreed.conditions, agreed.kernels.names)

    def _between(self, done: int, total: int, label: str) -> None:
        """Between two measurements, at the same ones on all ranks that measure together."""
        if self._ending is not None:
            told = torch.tensor([float(self._ending.is_told_to_end())])
            if largest(told, self._group).item():
                raise SIGTERMException
        if self._progress is not None:
            self._progress(done, total, label)

    def _profiled(self) -> Profile:
        """The profile file of this stage's first rank, or else a new one, which is saved there."""
        runner, group = self._runner, self._group
        path = of_stage(self._options.profile, runner.context)
        given: Profile | str | None = None
        if path is not None and runner.context.topology.rank_in_stage == 0 and path.exists():
            try:
                given = Profile.load(path, self._made_for)
            except FileError as error:
                given = str(error)
        given = of_all_ranks(given, group)[0]
        refusal = given if isinstance(given, str) else ""
        refused = [text for text in of_all_ranks(refusal, runner.context.world_group) if text]
        if refused:
            raise FileError(refused[0])
        # Stages measure together, or none does: what operators read comes from another stage.
        if all(of_all_ranks(given is not None, runner.context.world_group)):
            assert isinstance(given, Profile)
            return given
        profile = self.anew()
        if path is not None and runner.context.topology.rank_in_stage == 0:
            profile.save(path)
        return profile
