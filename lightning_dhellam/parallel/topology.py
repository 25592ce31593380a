"""The sizes of every kind of parallelism in a run, and the place of one rank in it.

The order of ranks is Megatron-core's, stated here and nowhere else: tensor ranks are neighbours,
then come context, data and pipeline ranks. Experts are spread over the ranks of a stage in an order
of their own, in which expert ranks come after the ranks that share each expert (expert tensor
parallelism: those of `tp`, or none), and then ranks that hold the same experts:

    rank = tp + tp_size * (cp + cp_size * (dp + dp_size * pp))
    rank = etp + etp_size * (ep + ep_size * (expert_dp + expert_dp_size * pp))

So experts that are not split lie on tensor, context and data-parallel ranks alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_dhellam.plan import Lane

LANES = (Lane.TP, Lane.PP, Lane.CP, Lane.EP, Lane.DP)
"""Lanes of communication between ranks."""


@dataclass(frozen=True)
class Topology:
    """The sizes of a run, as the user asked for them, and which of its ranks this process is.

    The number of data-parallel ranks follows: it is what the others leave of the world.

    Attributes:
        world_size: ranks of the run.
        rank: this one of them.
        tp_size: ranks that share each layer (tensor and sequence parallelism).
        pp_size: stages that share the layers (pipeline parallelism).
        cp_size: ranks that share each sequence (context parallelism).
        ep_size: ranks that share the experts of each layer (expert parallelism).
        etp_size: ranks that share each expert (expert tensor parallelism): those of `tp_size`, also
            if None is given, or 1.

    Raises:
        ValueError: the ranks cannot be cut into groups of these sizes.
    """

    world_size: int = 1
    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    ep_size: int = 1
    etp_size: int = None  # type: ignore[assignment]  # becomes a number in any case

    SPELLING: ClassVar[dict[str, str]] = {
        "tp_size": "tensor_parallel_size",
        "pp_size": "pipeline_parallel_size",
        "cp_size": "context_parallel_size",
        "ep_size": "expert_parallel_size",
    }
    """What the user calls the sizes."""

    def __post_init__(self) -> None:
        sizes = {shown: getattr(self, name) for name, shown in self.SPELLING.items()}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r} must be an integer of at least 1")
        self._check_model(sizes)
        if self.etp_size is None:
            object.__setattr__(self, "etp_size", self.tp_size)
        if self.etp_size not in (1, self.tp_size) or isinstance(self.etp_size, bool):
            ranks = f" or {self.tp_size}" if self.tp_size > 1 else ""
            raise ValueError(
                f"expert_tensor_parallel_size={self.etp_size!r} with"
                f" tensor_parallel_size={self.tp_size} must be 1{ranks}: experts are whole, or"
                " split over all tensor-parallel ranks"
            )
        self._check_experts()
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"

    def _check_model(self, sizes: dict[str, int]) -> None:
        model = self.tp_size * self.pp_size * self.cp_size
        if self.world_size % model == 0:
            return
        given = {n: s for n, s in sizes.items() if s > 1 and n != self.SPELLING["ep_size"]}
        raise ValueError(
            f"{_spell(given)} needs a multiple of {model} processes, but the world size is"
            f" {self.world_size}: set devices × num_nodes to a multiple of {model}, or lower"
            f" {' × '.join(given)} to a divisor of {self.world_size}"
        )

    def _check_experts(self) -> None:
        experts = self.etp_size * self.ep_size
        if self.stage_size % experts == 0:
            return
        holder = f"a stage of {self.pp_size}" if self.pp_size > 1 else "the job"
        split = f" x {self.etp_size} that share each expert" if self.etp_size > 1 else ""
        whole = " or set expert_tensor_parallel_size=1" if self.etp_size > 1 else ""
        raise ValueError(
            f"expert_parallel_size={self.ep_size}{split} needs a multiple of {experts} ranks, but"
            f" {holder} has {self.stage_size}: lower expert_parallel_size to a divisor of"
            f" {self.stage_size // self.etp_size}{whole}"
        )

    @property
    def shared(self) -> tuple[int, int, int]:
        """How many ranks share a layer, a sequence, and the experts of a layer.

        Where all are 1, layers do not communicate.
        """
        return self.tp_size, self.cp_size, self.ep_size

    @property
    def dp_size(self) -> int:
        """Ranks that hold the same weights and train on other samples (data parallelism)."""
        return self.world_size // (self.tp_size * self.cp_size * self.pp_size)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, over which gradients are added up.

        They train on other samples, or on other parts of the same.
        """
        return self.dp_size * self.cp_size

    @property
    def replica(self) -> int:
        """Which of those this rank is."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def experts_see_several_batches(self) -> bool:
        """Whether ranks that share experts train on other samples than each other."""
        return self.etp_size * self.ep_size > self.tp_size * self.cp_size

    @property
    def tp_rank(self) -> int:
        """Which part of each layer this rank holds."""
        return self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        """Which part of each sequence this rank holds."""
        return self.rank // self.tp_size % self.cp_size

    @property
    def ep_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.rank // self.etp_size % self.ep_size

    @property
    def etp_rank(self) -> int:
        """Which part of each of its experts this rank holds."""
        return self.rank % self.etp_size

    @property
    def expert_dp_size(self) -> int:
        """Ranks that hold the same experts, over which their gradients are added up."""
        return self.stage_size // (self.etp_size * self.ep_size)

    @property
    def expert_dp_rank(self) -> int:
        """Which of those this rank is."""
        return self.rank_in_stage // (self.etp_size * self.ep_size)

    @property
    def dp_rank(self) -> int:
        """Which part of the global batch this rank trains on."""
        return self.rank // (self.tp_size * self.cp_size) % self.dp_size

    @property
    def pp_rank(self) -> int:
        """Which pipeline stage this rank is."""
        return self.rank // self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.world_size // self.pp_size

    @property
    def rank_in_stage(self) -> int:
        """Which rank of its pipeline stage this one is.

        It is the same on every stage of a pipeline, so what depends on it, such as the random
        numbers of a micro-batch, does not depend on the number of stages.
        """
        return self.rank % self.stage_size

    @property
    def stage(self) -> Topology:
        """This rank's pipeline stage, as if it were the whole world."""
        return Topology(
            world_size=self.stage_size,
            rank=self.rank_in_stage,
            tp_size=self.tp_size,
            cp_size=self.cp_size,
            ep_size=self.ep_size,
            etp_size=self.etp_size,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """How many ranks there are of every kind of parallelism, by lane."""
        return {lane.value: self.size(lane) for lane in LANES}

    def size(self, lane: Lane) -> int:
        """How many ranks communicate with each other on a communication `lane`."""
        size: int = getattr(self, f"{lane.value}_size")
        return size

    def groups(self, lane: Lane) -> list[list[int]]:
        """The ranks of every group of a communication `lane`, by the order of their first ranks."""
        size, step = self.size(lane), self.step(lane)
        firsts = (rank for rank in range(self.world_size) if rank // step % size == 0)
        return [[first + step * place for place in range(size)] for first in firsts]

    def step(self, lane: Lane) -> int:
        """How far apart neighbours of a group of `lane` are."""
        return {
            Lane.TP: 1,
            Lane.CP: self.tp_size,
            Lane.EP: self.etp_size,
            Lane.DP: self.tp_size * self.cp_size,
            Lane.PP: self.stage_size,
        }[lane]


def _spell(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
