"""`dhellam bench published`: what was published of two strands, predicted in the same settings.

Nothing is measured and no GPU is needed: steps of `sequential`, `megatron`, `dhellam` and `auto` on
the published clusters are played from a profile of one rank, by data sheets as far as it is one of
another device. Where the prediction is apart from what was published, its own lanes say why.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.published.run import measure
from lightning_dhellam.bench.published.settings import Settings

BENCHMARK = Benchmark(
    "published", "published gains of two strands beside what is predicted of ours, on no GPU",
    Settings, measure,
)  # fmt: skip
