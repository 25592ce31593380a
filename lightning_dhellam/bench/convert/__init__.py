"""`dhellam bench convert`: folders of Hugging Face, read and written, against the disk's own rate.

Caches are emptied before each reading, and each writing ends when everything is on the disk.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.convert.run import measure
from lightning_dhellam.bench.convert.settings import Settings

BENCHMARK = Benchmark(
    "convert",
    "folders of Hugging Face read and written, against safetensors and the disk itself",
    Settings,
    measure,
)
