"""The processes of a job: how they start, who they are, and what they tell each other."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_dhellam.failures import Board, fold, judge
from lightning_dhellam.parallel import Cluster, ParallelContext, Topology
from lightning_dhellam.parallel.collectives import reduced
from lightning_dhellam.parallel.nccl import open_queues
from lightning_dhellam.parallel.presence import Presence, presence_of_world
from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.placement import Placement
from lightning_dhellam.remote import Folder
from lightning_dhellam.strategy import checks
from lightning_dhellam.strategy.alone import is_shared
from lightning_dhellam.strategy.launcher import CheckingLauncher, StartedLauncher
from lightning_dhellam.strategy.placed import accept, device_of, is_placed
from lightning_dhellam.strategy.restarts import (
    Life,
    Note,
    RestartingLauncher,
    nodes_of_life,
    store_of_life,
)
from lightning_dhellam.strategy.termination import (
    end_soon_at_exit,
    parent_of_rank,
    watch_parent,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl


_SAVED = "Trainer.save_checkpoint"
"""The barrier behind a save, in which all ranks have met: NCCL's would wait for the device."""


class JobStrategy(ParallelStrategy):
    """A strategy of one process per device, in groups of every kind of parallelism.

    Its subclass sets the attributes, checks a run, and says how the layers are split.

    Attributes:
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: stages that share the layers.
        context_parallel_size: ranks that share each sequence.
        context_transport: what carries exchanges between those.
        pipeline_transport: what carries transfers between stages.
        expert_parallel_size: ranks that share the experts of each layer.
        expert_tensor_parallel_size: ranks that share each expert; None for those of a layer.
        cluster: that this process only pretends to be part of, or None.
        timeout: after which a collective that a rank does not join fails.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int
    context_parallel_size: int
    context_transport: str
    pipeline_transport: str
    expert_parallel_size: int
    expert_tensor_parallel_size: int | None
    cluster: Cluster | None
    timeout: timedelta
    num_nodes = 1
    _context: ParallelContext | None = None
    _runs: int = 0
    _is_alone: bool | None = None
    _parent_watch: Event | None = None
    _board: Board | None = None
    _presence: Presence | None = None
    _failed_by: str | None = None

    def check(self, trainer: pl.Trainer, data: Any = None, ckpt_path: Any = None) -> None:
        """Refuse what cannot work, before any process computes."""
        raise NotImplementedError

    def prepare(self, trainer: pl.Trainer) -> None:
        """See what a trainer is asked for, before it runs."""

    def placement(self) -> Placement:
        """Which stage holds which chunk of the layers."""
        raise NotImplementedError

    def ties(self) -> bool:
        """Whether embedding and output layer have one weight."""
        raise NotImplementedError

    def layers_of_chunks(self) -> tuple[int, ...]:
        """Layers of each chunk of the pipeline."""
        raise NotImplementedError

    def crossing(self) -> Mapping[Lane, int]:
        """Bytes that lanes carry of a micro-batch of the longest sequences, by lane."""
        raise NotImplementedError

    @property
    def context(self) -> ParallelContext:
        """Groups and sizes of this rank."""
        if self._context is None:
            raise RuntimeError(
                "DHellamStrategy.context is not known before the processes have started: use it in"
                " `configure_model` or later"
            )
        return self._context

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        if is_placed(self.cluster_environment):
            return device_of(self.cluster_environment, self.parallel_devices)
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes of this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def processes(self) -> int:
        """Processes of the job, before they have started as well; one that emulates is alone."""
        if is_placed(self.cluster_environment):
            assert self.cluster_environment is not None
            return self.cluster_environment.world_size()
        return self.num_processes * self.num_nodes

    @property
    def topology(self) -> Topology:
        """Sizes and ranks of the job or the emulated cluster; the rank is 0 before there are any.

        Raises:
            ValueError: the sizes do not fit the number of processes.
        """
        return Topology(
            world_size=self.cluster.world_size if self.cluster is not None else self.processes,
            tp_size=self.tensor_parallel_size,
            pp_size=self.pipeline_parallel_size,
            cp_size=self.context_parallel_size,
            ep_size=self.expert_parallel_size,
            etp_size=(
                self.tensor_parallel_size
                if self.expert_tensor_parallel_size is None
                else self.expert_tensor_parallel_size
            ),
        )

    @property
    def is_distributed(self) -> bool:
        """Lightning asks strategies that it does not know, before it reduces logged values."""
        return True

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Samples are dealt to the data-parallel ranks; all others of a model see the same."""
        topology = self.context.topology
        return {"num_replicas": topology.dp_size, "rank": topology.dp_rank}

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally:
            life = Life.find()
            self._launcher = StartedLauncher(self.prepare)
            if life is not None and isinstance(self.cluster_environment, TorchElasticEnvironment):
                self._launcher = RestartingLauncher(
                    life, lambda: JobStrategy._runs + 1, self.prepare
                )
                self.num_nodes = nodes_of_life(self.num_processes, self.num_nodes)
            if self.cluster is None:
                checks.check_processes(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = CheckingLauncher(
                self.cluster_environment,
                self.num_processes,
                self.num_nodes,
                self.check,
                self.prepare,
            )
        accept(type(self), self.cluster_environment)
        _ = self.topology  # refuses sizes that do not fit
        if self.cluster is not None:
            checks.check_emulation(self.processes)

    @override
    def setup_environment(self) -> None:
        if self.root_device.type == "cuda":
            obstacle = open_queues()
            if obstacle:
                rank_zero_warn(obstacle)
        super().setup_environment()
        JobStrategy._runs += 1
        self._is_alone = None
        reset_seed()
        self._set_world_ranks()
        if self.cluster is not None:
            self.cluster.join()
        else:
            self._join_processes()
        self._context = ParallelContext.create(
            self.root_device,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            context_parallel_size=self.context_parallel_size,
            expert_parallel_size=self.expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            cluster=self.cluster,
            pipeline_split=self.layers_of_chunks(),
            timeout=self.timeout,
            context_transport=self.context_transport,
            pipeline_transport=self.pipeline_transport,
            crossing=self.crossing(),
            placement=self.placement(),
            tied=self.ties(),
        )
        if isinstance(self._launcher, RestartingLauncher):
            self._launcher.check_agreed(self._context.world_group)

    @property
    def _note(self) -> Note | None:
        """Where the first rank notes for later lives of the job where it saves, if it may have."""
        launcher = self._launcher
        is_first = self.global_rank == 0
        return launcher.note if isinstance(launcher, RestartingLauncher) and is_first else None

    def _of_earlier_lives(self, path: Folder) -> Sequence[Folder] | None:
        """Older checkpoints of the job, if it goes on from `path` by itself; see `restarts`."""
        launcher = self._launcher
        if not isinstance(launcher, RestartingLauncher) or not isinstance(path, Path):
            return None
        return launcher.others(path)

    def _set_world_ranks(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        if not is_placed(environment):
            environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            environment.set_world_size(self.processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _join_processes(self) -> None:
        assert self.cluster_environment is not None
        backend = _get_default_process_group_backend_for_device(self.root_device)
        device_id = self.root_device if self.root_device.type == "cuda" else None
        # From here on this process waits for others.
        self._board = Board.find()
        if self._board is not None:
            self._board.run += 1
        self._parent_watch = watch_parent(self.timeout.total_seconds())
        _init_dist_connection(
            self.cluster_environment,
            backend,
            timeout=self.timeout,
            device_id=device_id,
            **store_of_life(self.timeout),
        )
        self._presence, self._failed_by = presence_of_world(self.timeout), None
        if self._presence is not None:
            self._presence.enter(JobStrategy._runs)

    def _say_why(self, error: BaseException) -> None:
        """Let one rank of the job say why it fails."""
        self._failed_by = type(error).__name__
        launcher = self._launcher
        alone = self.processes == 1 or self.cluster is not None
        if isinstance(launcher, CheckingLauncher):
            alone = alone or launcher.board is None  # nobody else has been started
            board = launcher.board
        else:
            board = self._board or Board.find()
        if alone:
            fold(error)
        else:
            judge(error, self.global_rank, board, parent_of_rank(), self.lost_rank)

    def lost_rank(self) -> str | None:
        """Which rank is gone that this run cannot do without, in words; None while none is."""
        return self._presence.lost if self._presence is not None else None

    def _leave(self, *, ended_well: bool) -> None:
        """The run is over: other runs may use the groups if it has left nothing in them."""
        if ended_well and self._parent_watch is not None:
            self._parent_watch.set()
        if self._presence is not None:
            self._presence.leave(None if ended_well else self._failed_by or "an error")
        if ended_well and self._note is not None:
            self._note.end()
        if not ended_well and self.cluster is None and self.topology.world_size > 1:
            end_soon_at_exit()
        if self._context is not None:
            self._context.destroy(keep=ended_well and self.cluster is None)
            if self.cluster is not None:
                dist.destroy_process_group()

    @property
    def alone(self) -> bool:
        """Whether an exception ends this rank and not the others, so that it must not wait for
        them: a callback may want to save a checkpoint then, or ask them something."""
        trainer = self._lightning_module._trainer if self._lightning_module is not None else None
        error = sys.exception()
        if trainer is None or trainer.state.status is not TrainerStatus.INTERRUPTED:
            return False
        if error is None or not _distributed_is_initialized() or self.cluster is not None:
            return False
        if self._is_alone is None:
            place = f"run {self._runs} step {trainer.global_step}"
            self._is_alone = dist.get_world_size() > 1 and not is_shared(error, place)
        return self._is_alone

    @override
    def barrier(self, name: str | None = None) -> None:
        if not _distributed_is_initialized() or self.alone or name == _SAVED:
            return
        if self.root_device.type == "cuda":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not _distributed_is_initialized() or self.cluster is not None or self.alone:
            return obj
        objects = [obj]
        # In host memory, where there is such a group: callbacks that save ask in each step, and
        # NCCL would wait for the device.
        group = self._context.host_group if self._context is not None else None
        dist.broadcast_object_list(objects, src, group=group)
        return objects[0]

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Any:
        """Over the data-parallel ranks: all ranks of a model hold the same value."""
        if isinstance(tensor, Tensor) and not self.alone:
            return reduced(tensor, group or self.context.groups.dp, reduce_op)
        return tensor

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.alone:
            return decision
        mine = torch.tensor(int(decision), device=self.root_device)
        return bool(reduced(mine, self.context.world_group, "min" if all else "max"))
