"""`dhellam bench pipeline`: our schedules against Megatron-core's 1F1B, on CPU with gloo.

`auto` is what `schedule='auto'` comes to. All sides have the same weights and micro-batches, split
the same model over the same processes, and run forward and backward of a step without an optimizer.
On one machine the processes share its cores, so the times say what the schedules cost there, not
what a cluster would gain; losses and gradient norms show that all sides compute the same.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.pipeline.run import measure
from lightning_dhellam.bench.pipeline.settings import Settings

BENCHMARK = Benchmark(
    "pipeline", "our schedules against Megatron-core's 1F1B, CPU processes with gloo",
    Settings, measure,
)  # fmt: skip
