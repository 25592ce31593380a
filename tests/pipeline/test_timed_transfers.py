"""What a profile measures of transfers between stages: on CPUs, whose receives do not spin."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from lightning_dhellam.autosearch import transfers
from lightning_dhellam.layers import lower
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.search.measure import Transfer
from lightning_dhellam.search.pipeline.links import Link, links_of
from tests.engine.harness import CPU, engine_of, prepared
from tests.models.llama import SMALL
from tests.ranks import run_ranks

STAGES = 3


def _rows(rank: int, spins: bool) -> tuple[list[Transfer], list[str]]:
    """The rows of a stage, and what it does in the last round in which a receive waits."""
    done: list[str] = []

    def noted(name: str, what: Any) -> Any:
        def run(*args: Any) -> Any:
            done.append(name)
            return what(*args)

        return run

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transfers, "_ROUNDS", 2)
        patched.setattr(transfers, "_SIDE", {"cpu": 32})
        patched.setattr(transfers, "_spins", lambda context: spins)
        for name in ("send", "receive"):
            patched.setattr(transfers, name, noted(name, getattr(transfers, name)))
        compute = transfers._Timer._compute
        patched.setattr(transfers._Timer, "_compute", noted("compute", compute))
        context = ParallelContext.create(CPU, pipeline_parallel_size=STAGES)
        model = prepared(replace(SMALL, num_layers=6), context)
        found = transfers.take_transfers(engine_of(lower(model)), context, 64)
        context.destroy()
    return list(found), done[-3:]


@pytest.mark.parametrize("spins", [True, False])
def test_a_receive_that_spins_is_measured_while_it_waits(spins: bool) -> None:
    pairs = [{(0, 1)}, {(1, 0), (1, 2)}, {(2, 1)}]
    for stage, (rows, last) in enumerate(run_ranks(STAGES, _rows, spins)):
        assert {(row.source, row.target) for row in rows} == pairs[stage]
        for row in rows:
            assert row.spins is spins
            assert 0 <= row.waits < 1 if row.waits is not None else not spins
        # It is posted before all that is computed, and its message sent behind.
        assert (last == ["receive", "compute", "send"]) is spins
    assert asdict(rows[0]).keys() == asdict(Transfer(0, 1, 1.0, 1.0, 1.0)).keys()


def test_rows_of_before_say_nothing_of_it() -> None:
    row = {"source": 0, "target": 1, "bytes": 4.0, "seconds": 1.0, "beside": 2.0, "takes": 0.3}
    assert links_of([Transfer(**row, spins=True)]) == {(0, 1): Link(2.0, 0.0, 0.3)}
    assert links_of([Transfer(**row, spins=False)])[0, 1].waiting == 0.0
    assert links_of([Transfer(**row, waits=0.05)])[0, 1].waiting == 0.05
