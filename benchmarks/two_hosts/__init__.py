"""Hiding communication over a real, slow network, against Megatron-core.

    sudo .venv/bin/python -m benchmarks.two_hosts [options]

Two processes in network namespaces of one machine, a core each, joined by a link whose rate is
limited: tensor parallel 2 with gloo. Everything is real, only slow. All sides train the same Llama
from the same weights on the same batch, in turn, on the same hosts; `megatron-core` is
Megatron-core's own GPTModel under its own forward-backward function, the others are our plans.

The bound is what the busier of compute and link needs for a step, each undisturbed: a step whose
collectives send nothing, and the collectives of a step without anything else, timed among the
others. What the simulator says is of operators that were timed among the steps as well: machines
drift. A host has one core, on which gloo copies and sends as well, and the kernel's network with
it: `cpu s` is what all of it costs in a step.
"""
