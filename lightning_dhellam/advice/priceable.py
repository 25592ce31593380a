"""A run whose operators have prices on a cluster: what all that is predicted of it follows from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from lightning_dhellam.advice.lowering import Lowering, work_of
from lightning_dhellam.engine.inputs import check_length
from lightning_dhellam.layers import fp8_formats
from lightning_dhellam.memory import Run
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.parallel.networks import Device
from lightning_dhellam.plan import Builder, Lane
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.recipes import clusters
from lightning_dhellam.search.cluster import (
    BARS,
    Groups,
    Known,
    Machine,
    Origin,
    Played,
    Priced,
    Pricing,
    Straggler,
    Work,
    played,
)
from lightning_dhellam.search.cluster.step import Visits
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.pipeline import Link


@dataclass(frozen=True)
class Conditions:
    """What a prediction is made for, besides the run.

    Attributes:
        cluster: with its device and networks.
        profile: of a rank, or None.
        model: what the user calls it.
        straggler: times that compute is slower on one rank.
        slower: times that lanes are slower than their networks say.
    """

    cluster: Cluster
    profile: Profile | None = None
    model: str = "model"
    straggler: float = 1.0
    slower: Mapping[Lane, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [name for name in clusters.names() if Cluster.load(name).device is not None]
        if self.cluster.device is None or self.cluster.networks is None:
            raise ValueError(
                f"cluster '{self.cluster.name}' does not say what it is built of: give it `device`"
                f" and `networks`, as {', '.join(known)} have them"
            )

    @property
    def device(self) -> Device:
        """What a rank computes on."""
        assert self.cluster.device is not None
        return self.cluster.device

    @property
    def machine(self) -> Machine:
        """What ranks run on, if they compute in numbers of two bytes."""
        assert self.cluster.networks is not None
        return Machine(self.device, self.cluster.networks, self.slower)

    def known(self) -> Known | None:
        """What the profile tells."""
        if self.profile is None:
            return None
        return Known(self.profile, {d.name: d for d in [*data_sheets(), self.device]})


def data_sheets() -> list[Device]:
    """The devices of the clusters that ship."""
    found = (Cluster.load(name).device for name in clusters.names())
    return [device for device in found if device is not None]


def check_run(run: Run, cluster: Cluster) -> None:
    """Refuse a run of which nothing is predicted on a cluster.

    Raises:
        ValueError: it has more ranks than the cluster, computes in 8 bits where the device or the
            model do not, or has sequences that it could not train on.
    """
    topology = run.topology
    if topology.world_size > cluster.world_size:
        raise ValueError(
            f"the run has {topology.world_size} ranks, but cluster '{cluster.name}' has"
            f" {cluster.world_size}: use trainer.devices × trainer.num_nodes of at most"
            f" {cluster.world_size}"
        )
    if run.fp8 is not None:
        assert cluster.device is not None
        check_eight_bits(run.fp8, cluster.device, run)
    longest = run.config.max_sequence_length
    check_length(run.length, longest, topology.tp_size, topology.cp_size)


def check_device(fp8: str, device: Device, spelt: str = "") -> None:
    """Refuse 8 bits on a device that computes in none.

    Args:
        fp8: the format.
        device: that would compute in it.
        spelt: the format as the user has written it, if not as an argument.

    Raises:
        ValueError: with a device that does.
    """
    fp8_formats.check_name(fp8, spelt)
    if device.flops_fp8 is None:
        known = dict.fromkeys(one.name for one in data_sheets() if one.flops_fp8 is not None)
        option = spelt.partition(" ")[0] or "fp8"
        raise ValueError(
            f"{spelt or f'fp8={fp8!r}'} is not predicted on {device.name}, which by its data sheet"
            f" multiplies no numbers of 8 bits: leave {option} out, take a cluster of"
            f" {' or '.join(known)}, or add `flops_fp8` of the cluster's device, if it does"
        )


def check_eight_bits(fp8: str, device: Device, run: Run) -> None:
    """Refuse a run in 8 bits that could not be.

    Raises:
        ValueError: of its device, its precision, or its model's sizes.
    """
    check_device(fp8, device)
    dtype = PRECISIONS[run.precision].dtype
    fp8_formats.check_place(fp8, torch.device("cuda"), dtype, None)
    fp8_formats.check_shapes(fp8, run.config, run.topology.tp_size)


@dataclass(frozen=True)
class Priceable:
    """A run whose operators have prices: what all that is predicted of it follows from.

    Attributes:
        run: of which a step is predicted.
        work: of its step.
        priced: its operators.
        slow: the same of a straggler; None where there is none.
        conditions: that it is predicted for.
        machine: that its ranks run on.
        known: what a profile tells.
        schedule: name of what was found for a run that is to search its schedule; else empty.
    """

    run: Run
    work: Work
    priced: Priced
    slow: Priced | None
    conditions: Conditions
    machine: Machine
    known: Known | None
    schedule: str = ""

    @classmethod
    def of(
        cls,
        run: Run,
        conditions: Conditions,
        known: Known | None,
        lowering: Lowering | None = None,
        priced: Priced | None = None,
    ) -> Priceable:
        """Lower a run, unless that is done already, and price its operators.

        Args:
            run: of which a step is to be predicted.
            conditions: that it is predicted for.
            known: what their profile tells.
            lowering: of a rank, where it is known.
            priced: its operators, where they are known.

        Raises:
            ValueError: as `check_run`; or the run cannot be cut like this.
        """
        check_run(run, conditions.cluster)
        topology = run.topology
        work = work_of(run, lowering)
        graphs = [g for pair in work.distinct.values() for g in (pair.forward, pair.backward)]
        machine = replace(
            conditions.machine, in_fp32=PRECISIONS[run.precision].dtype is torch.float32
        )
        pricing = Pricing(machine, topology, work.tokens, known)
        slow = None
        if conditions.straggler != 1.0:
            late = replace(machine, straggler=conditions.straggler)
            slow = replace(pricing, machine=late).price(graphs)
        return cls(run, work, priced or pricing.price(graphs), slow, conditions, machine, known)

    @property
    def groups(self) -> Groups:
        """Ranks over which gradients are added up."""
        return self._groups(self.machine)

    @property
    def link(self) -> Link | None:
        """What is between stages; None without a pipeline."""
        return self._link(self.machine, 0)

    def play(
        self,
        builders: Mapping[str, Builder],
        wrong: int = 0,
        sketch: bool = False,
        known: Visits | None = None,
    ) -> Played:
        """Play a step under the fastest of some orders; see `search.cluster.played`.

        Args:
            builders: the orders.
            wrong: 1 if all that is uncertain turns out badly, on stragglers as on others; -1 if it
                turns out well.
            sketch: whether to play few layers of many that are alike.
            known: visits that were played already, if nothing is wrong; see `played`.
        """
        machine = self.machine.wrong(wrong) if wrong else self.machine
        return played(
            self.work,
            self.priced.at(wrong),
            builders,
            machine,
            self._groups(machine),
            link=self._link(machine, wrong),
            slow=self._straggler(machine, wrong),
            sketch=sketch,
            known=known,
        )

    def _straggler(self, machine: Machine, wrong: int) -> Straggler | None:
        if self.slow is None:
            return None
        late = replace(machine, straggler=self.conditions.straggler)
        return Straggler(self.slow.at(wrong), late)

    def _groups(self, machine: Machine) -> Groups:
        topology = self.run.topology
        networks = machine.networks.slower(machine.slower.get(Lane.DP, 1.0))
        experts = networks.of(topology.expert_dp_size, topology.etp_size * topology.ep_size)
        return Groups(machine.reach(Lane.DP, topology), experts)

    def _link(self, machine: Machine, wrong: int) -> Link | None:
        topology, known = self.run.topology, self.known
        if topology.pp_size == 1:
            return None
        reach = machine.reach(Lane.PP, topology)
        takes = reach.network.sms / machine.device.multiprocessors
        rate = None
        if known and known.is_of(machine) and reach.size == 2 and reach.nodes == 1:
            rate = known.rate(2)
        if rate is None:
            return Link(reach.ring, reach.network.latency, takes)
        # As wrong as what is told from another size of it.
        times = machine.slower.get(Lane.PP, 1.0) * (1 + wrong * BARS[Origin.SCALED])
        return Link(rate / times, reach.network.latency, takes)
