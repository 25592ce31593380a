"""`dhellam bench overlap`: how much communication hides, on one rank of an emulated cluster.

    a   Llama-3-70B width, tensor parallel 8, sequence 8192, micro-batch 1
    b   Qwen3-14B width, tensor parallel 8, sequence 8192, micro-batch 4
    m   Phi-3.5-MoE width, experts on 8 ranks, sequence 4096, micro-batch 2

The transformer layers alone are trained, without embedding and loss head, so that the time of a
layer is its own: what a step of more micro-batches takes longer, by micro-batch and layer. A link
is a copy engine or some SMs (`parallel.link`); numbers do not come over it, so plans are compared
for equal results in a step in which every collective brings this rank's own numbers, and attention
adds up in a fixed order.

`compute` is measured with collectives that take no time. The bound is what the busier of compute
and link needs for a layer, each undisturbed.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.overlap.run import measure
from lightning_dhellam.bench.overlap.settings import Settings

BENCHMARK = Benchmark(
    "overlap",
    "layer and step times of every plan over emulated links, against the bound",
    Settings,
    measure,
)
