"""`dhellam bench throughput`: whole training steps under a Trainer, against Hugging Face's Llama.

Both sides take the same batches from the same initial weights, several micro-batches of one
sample to an optimizer step. Ours is `bf16-mixed`: fp32 gradients and fp32 master weights. Theirs
is what a Lightning user writes today: `LlamaForCausalLM`, `bf16-true`, fused AdamW,
`accumulate_grad_batches`, eager or compiled; the faster of the two counts.

Every side of every case has a process of its own. The report is saved after each, so what was
measured stays when a later one fails or the budget ends.
"""

from lightning_dhellam.bench.benchmark import Benchmark
from lightning_dhellam.bench.throughput.run import measure
from lightning_dhellam.bench.throughput.settings import Settings

BENCHMARK = Benchmark(
    "throughput",
    "token rate and MFU of training steps, against Hugging Face under a plain Trainer",
    Settings,
    measure,
)
