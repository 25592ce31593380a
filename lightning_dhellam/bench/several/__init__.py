"""`dhellam bench several`: every plan, and Megatron-core's own step, over real links between GPUs.

    a   Llama-3-70B width, sequence 8192, micro-batch 1
    b   Qwen3-14B width, sequence 8192, micro-batch 4
    m   Phi-3.5-MoE width, sequence 4096, micro-batch 2

For each case, one after the other and each in processes of its own: Megatron-core trains its own
model with its own schedule, DDP and optimizer, in the environment that it asks for; ours trains the
same model from the same weights by each plan and schedule, those that a search finds among them;
and one process plays a rank of the same group with links as fast as those that were measured, to
show what emulation is worth.

`step ms` is forward, backward and the reduction of gradients, `whole ms` has the optimizer as well.
MFU counts attention causal-halved.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.several.run import measure
from lightning_dhellam.bench.several.settings import Settings

BENCHMARK = Benchmark(
    "several",
    "plans and Megatron-core's own step over real links of several GPUs, and emulated",
    Settings,
    measure,
)
