"""Processes and devices: the explicit `ParallelContext` and the CPU stand-in for CUDA."""

from lightning_dhellam.parallel.context import ParallelContext, check_sizes
from lightning_dhellam.parallel.cpu import megatron_device
from lightning_dhellam.parallel.emulate import Cluster, Link

__all__ = ["Cluster", "Link", "ParallelContext", "check_sizes", "megatron_device"]
