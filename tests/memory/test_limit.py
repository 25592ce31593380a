"""What is refused, and what is offered instead, in order of cost."""

from __future__ import annotations

from dataclasses import replace

from lightning_dhellam.memory.limit import cannot_fit, changes, cheapest_change, refusal
from lightning_dhellam.memory.prediction import RankMemory, Run
from lightning_dhellam.models import preset
from lightning_dhellam.parallel.topology import Topology

RUN = Run(preset("llama-tiny"), Topology(world_size=8, tp_size=2), 8, 128, micro_batch_size=4)


def test_what_would_fit_within_the_margin_is_not_refused() -> None:
    assert not cannot_fit(100, 95)
    assert cannot_fit(100, 94)


def test_changes_come_in_the_order_of_their_cost() -> None:
    found = [text for text, _ in changes(replace(RUN, distributed_optimizer=False))]
    light = "recompute='selective', distributed_optimizer=True"
    full = "recompute='full', distributed_optimizer=True, micro_batch_size=1"
    assert found == [
        "recompute='selective'",
        light,
        f"{light}, micro_batch_size=2",
        f"{light}, micro_batch_size=1",
        full,
        *(
            f"{base}, {size}"
            for base in (light, full)
            for size in (
                "tensor_parallel_size=4",
                "tensor_parallel_size=8",
                "pipeline_parallel_size=2",
                "pipeline_parallel_size=4",
                "context_parallel_size=2",
                "context_parallel_size=4",
            )
        ),
    ]


def test_nothing_is_offered_that_no_run_can_have_or_that_was_chosen_already() -> None:
    run = replace(RUN, recompute="full", micro_batch_size=1, topology=Topology())
    assert [text for text, _ in changes(run)] == []

    def predicted(run: Run) -> list[RankMemory]:
        return [RankMemory(0, 1, 1 << 30, 0, 0, 0, 0)] if run.topology.tp_size == 8 else []

    # Eight ranks cannot share the four heads of this model.
    assert cheapest_change(RUN, 1 << 20, predicted) == "recompute='selective'"
    assert all(run.topology.tp_size < 8 or _refused(run) for _, run in changes(RUN))


def _refused(run: Run) -> bool:
    try:
        run.check()
    except ValueError:
        return True
    return False


def test_a_refusal_is_a_line_with_a_remedy() -> None:
    text = refusal(1, 90 << 30, 80 << 30, "the device", "micro_batch_size=1")
    assert text == (
        "this run would take 90 GiB on a rank of stage 1, and the device leaves 80 GiB:"
        " micro_batch_size=1 would fit; a larger memory_limit= tries it all the same"
    )
    assert "use more ranks, or a smaller model" in refusal(0, 2, 1, "memory_limit", None)
