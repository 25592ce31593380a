"""What a rank runs on, by data sheets, and how wrong they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from lightning_dhellam.parallel.networks import Device, Network, Networks, Reach
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.plan import Lane


class Origin(StrEnum):
    """Where a time comes from."""

    MEASURED = "measured"
    SCALED = "scaled"
    DERIVED = "derived"
    MODELLED = "modelled"


BARS: Mapping[Origin, float] = {
    Origin.SCALED: 0.07,
    Origin.DERIVED: 0.15,
}
"""Share by which a time may be wrong either way. Of what is measured the spread says it, and of
what is modelled its network does (`Network.error`)."""


@dataclass(frozen=True)
class Machine:
    """What a rank runs on.

    Attributes:
        device: by its data sheet.
        networks: between ranks.
        slower: times that lanes are slower than their networks say.
        straggler: times that compute is slower than it should be.
        in_fp32: whether it computes in fp32, or else in numbers of two bytes.
    """

    device: Device
    networks: Networks
    slower: Mapping[Lane, float] = field(default_factory=dict)
    straggler: float = 1.0
    in_fp32: bool = False

    def reach(self, lane: Lane, topology: Topology) -> Reach:
        """The group of a lane. That of `dp` adds up gradients, also of ranks that share
        sequences."""
        size, step = topology.size(lane), topology.step(lane)
        if lane is Lane.DP:
            size, step = topology.replicas, topology.tp_size
        return self.networks.slower(self.slower.get(lane, 1.0)).of(size, step)

    def host(self, lane: Lane) -> Network:
        """What is between a device and the memory of its host, one way.

        Raises:
            ValueError: nothing says it.
        """
        if self.networks.host is None:
            raise ValueError(
                f"how fast {self.device.name} copies to the memory of its host is not known: add"
                " `host` with its bandwidth under `networks` in the cluster file, or leave offload"
                " out"
            )
        return self.networks.host.taking(self.slower.get(lane, 1.0))

    def flops(self) -> float:
        """Operations per second that its device could compute in its numbers at most.

        Raises:
            ValueError: nothing says it.
        """
        if not self.in_fp32:
            return self.device.flops
        if self.device.flops_fp32 is None:
            raise ValueError(
                f"how fast {self.device.name} computes in fp32 is not known: add `flops_fp32` under"
                " `device` in the cluster file, or train in bf16"
            )
        return self.device.flops_fp32

    def eight_bits(self, fp8: str) -> float:
        """How much faster its products are in a format of 8 bits, beside those of an H200.

        Nominal costs have what an H200 gains, whose sheet has twice the rate of 16 bits.

        Raises:
            ValueError: nothing says it.
        """
        if not fp8:
            return 1.0
        if self.device.flops_fp8 is None:
            raise ValueError(
                f"how fast {self.device.name} computes in 8 bits is not known: add `flops_fp8`"
                " under `device` in the cluster file, or leave fp8 out"
            )
        return self.device.flops_fp8 / (2 * self.device.flops)

    def wrong(self, sign: int) -> Machine:
        """The same if its networks and its memory are slower (1), or faster (-1), by as much as
        they may be."""
        memory = self.device.bandwidth / (1 + sign * BARS[Origin.DERIVED])
        device = replace(self.device, bandwidth=memory)
        return replace(self, device=device, networks=self.networks.wrong(sign))
