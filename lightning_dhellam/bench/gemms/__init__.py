"""`dhellam bench gemms`: the GEMMs of a layer through each BLAS library that torch can call.

Those of linear layers in 8 bits are computed by each backend and format, of operands that are cast
already; those of experts, of a model that has them, by each backend for all experts at once.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.gemms.run import measure
from lightning_dhellam.bench.gemms.settings import Settings

BENCHMARK = Benchmark(
    "gemms",
    "GEMMs of a layer and of the head: TFLOP/s forward and backward, by BLAS library",
    Settings,
    measure,
)
