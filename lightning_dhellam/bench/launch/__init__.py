"""`dhellam bench launch`: what the engine adds on the host to launching an operator.

The step is run with operators that return ready-made values instead of launching anything, so
all that is left is the engine: tapes, lanes, the ledger, the program.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.launch.run import measure
from lightning_dhellam.bench.launch.settings import Settings

BENCHMARK = Benchmark(
    "launch", "host time that the engine adds to an operator's own launch", Settings, measure
)
