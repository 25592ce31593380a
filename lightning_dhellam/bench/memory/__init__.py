"""`dhellam bench memory`: what a run is predicted to take of memory, and what it takes.

Each case trains some steps, with its optimizer, in a process that frees everything between cases.
Ranks of larger runs are played alone (`parallel.emulate`): their numbers mean nothing, and what
they hold is what they would. Numbers of the others are compared with those of the same step that
makes nothing again.

On a CPU slots are counted by the engine, in miniature, and must be as many as were predicted.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.memory.run import measure
from lightning_dhellam.bench.memory.settings import Settings

BENCHMARK = Benchmark(
    "memory",
    "predicted against measured memory of runs, and whether it grows from step to step",
    Settings,
    measure,
)
