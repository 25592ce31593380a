"""Processes and devices: `Topology`, `ParallelContext` and the CPU stand-in for CUDA."""

from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.cpu import megatron_device
from lightning_dhellam.parallel.emulate import Cluster, Link
from lightning_dhellam.parallel.topology import Topology

__all__ = ["Cluster", "Link", "ParallelContext", "Topology", "megatron_device"]
