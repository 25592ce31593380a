"""`dhellam bench checkpoint`: how fast checkpoints are saved and loaded, beside two other ways.

Processes of this host hold a model and its optimizer's state as a run of these sizes does, and
write and read it through checkpoints, through torch's distributed checkpoint with nothing around
it, and through a file per rank, as version 0.1 did. Then one device trains, and saves at once and
beside the steps that follow.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.checkpoint.run import measure
from lightning_dhellam.bench.checkpoint.settings import Settings

BENCHMARK = Benchmark(
    "checkpoint",
    "saving and loading a run's state beside plain DCP, and steps that save",
    Settings,
    measure,
)
