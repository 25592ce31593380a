"""`dhellam bench learning`: one model learns the same real text in several precisions.

The text is the source of Python's standard library and of packages that are installed with this
one, so it is on every machine, and nothing is downloaded; the report says which, of which versions
and under which licences. All precisions begin with the same weights and see the same batches. What
counts is how far the validation losses are from those of bf16.

Each precision leaves its curve, and on the way the state to go on from: the same command continues
where the last one has ended.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.learning.run import measure
from lightning_dhellam.bench.learning.settings import Settings

BENCHMARK = Benchmark(
    "learning",
    "validation losses of a model that learns real text, in 8 bits and fp16 against bf16",
    Settings,
    measure,
)
