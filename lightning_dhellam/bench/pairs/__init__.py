"""`dhellam bench pairs`: how much of each collective hides beside each compute operator.

The operators of one transformer layer are timed alone and two at a time: over an emulated link on
one device, or, when torchrun has started several processes, over the real one between them. The
number is what starting both together saves against one after the other, as a share of the shorter.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.pairs.run import measure
from lightning_dhellam.bench.pairs.settings import Settings

BENCHMARK = Benchmark(
    "pairs", "which operators hide which collectives: a heat map of this device and link",
    Settings, measure,
)  # fmt: skip
