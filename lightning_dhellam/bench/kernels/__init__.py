"""`dhellam bench kernels`: memory-bound kernels against a device copy of as many bytes.

GB/s counts the bytes that the operator must move, each input read once and each output written
once, for every implementation alike. An operator that fails its parity check is not timed.
Compiling takes longest, so those columns are filled last, as far as the budget goes.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.kernels.run import measure
from lightning_dhellam.bench.kernels.settings import Settings

BENCHMARK = Benchmark(
    "kernels",
    "memory-bound kernels: GB/s against a device copy, torch eager, compiled and Liger",
    Settings,
    measure,
)
