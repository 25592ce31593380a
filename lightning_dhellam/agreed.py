"""An engine whose plans are the same on all ranks, so that none waits for another forever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lightning_dhellam.engine import Engine, make_lanes
from lightning_dhellam.engine.structure import Structure
from lightning_dhellam.layers import Loss, Lowered, check_exchange, exchanges, lower
from lightning_dhellam.layers.narrower import narrower
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.parallel.collectives import largest, of_all_ranks, same_on_all_ranks
from lightning_dhellam.parallel.device import device_name
from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.parallel.replicas import start_alike
from lightning_dhellam.pipeline.schedules import AUTO as ANY
from lightning_dhellam.pipeline.schedules import (
    Scheme,
    begun,
    check_placed,
    content,
    restored,
    scheme_of,
)
from lightning_dhellam.plan import Builder, GraphPair
from lightning_dhellam.plan.by_layer import AUTO, USUAL, ByLayer, check_choices
from lightning_dhellam.plan.file import PlanFile, conditions, named_plan
from lightning_dhellam.plan.offloading import ALL, Offload, Slots, check_choice, check_offload
from lightning_dhellam.plan.passes import Recompute


class AgreedEngine:
    """The engine of one rank. Every rank makes one of the same model, and installs the same plans.

    Args:
        model: this rank's part of the model; what ranks hold alike becomes the first one's.
        plan: the name of a built-in plan, or the path of a plan file.
        micro_batch_size: samples that go through the layers together.
        loss: a loss of the user's own, from logits [B, S, V] and the micro-batch to a scalar.
        kernels: backends to use by operator; the fastest that this machine has for all others.
        recompute: what backward makes again, in place of keeping it: a choice of `plan.passes`, a
            list of choices and slots, or either by layer. With `auto` it is all that can be, until
            `use_recompute` is called; or what a plan file was searched with.
        offload: what of that which is saved waits for backward in host memory; with `auto` it is
            chosen as what is made again is, and until then it is all.
        context_exchange: how keys and values come to the ranks that share sequences; with `auto` a
            search may choose.
        context_fp32_gradients: whether gradients by them travel in fp32.
        context_fp8_keys: whether keys and values travel in 8 bits.
        schedule: order of the pipeline's works: a name, the path of a file, or None for the usual
            one. With `auto` it is what the plan file was searched with.
        fp8: how linear layers compute in 8 bits, or None.
        fp8_all_gather: whether what they gather travels in 8 bits.
        module: what holds the model and the loss; its buffers are as before after a profile.

    Attributes:
        engine: what carries out the plans.
        kernels: the backend of each operator.
        plan_in_use: the name of the plan, or what it was called when it was installed.
        structure: what the model is made of, for which the engine was made.
        exchanges: ways for keys and values that a search may choose from.
        recompute: what backward makes again.
        undecided: whether that is to be decided yet.
        chosen: what `use_recompute` was given; None before.
        offload: what of that which is saved waits on the host.
        offloads: whether that is chosen as well.
        schedule: name of the order in which stages work, or the path of its file.
        fp8: how linear layers compute in 8 bits, or None.
        narrower: options by which more could travel in 8 bits than the run was asked for.
        places: what each of the engine's layers is in the model.

    Raises:
        ValueError: a value that cannot work, or that differs between ranks.
    """

    def __init__(
        self,
        model: CausalLM,
        plan: str,
        micro_batch_size: int,
        *,
        loss: Loss | None,
        kernels: Mapping[str, str] | None,
        recompute: Recompute | ByLayer,
        offload: Offload,
        context_exchange: str,
        context_fp32_gradients: bool,
        context_fp8_keys: bool,
        schedule: str | None,
        fp8: str | None,
        fp8_all_gather: bool,
        module: torch.nn.Module,
    ) -> None:
        if plan == "auto":
            raise ValueError(
                "plan='auto' searches in the first steps of a Trainer: use a plan file, which"
                " `dhellam search` writes, or a built-in plan"
            )
        self._model = model
        self._context = model.context
        self._micro_batch_size = micro_batch_size
        self._length: int | None = None
        self._check_alike("pipeline_split", list(self._context.pipeline_split))
        self._check_alike("context_exchange", context_exchange)
        self._check_alike("context_fp32_gradients", context_fp32_gradients)
        self._check_alike("context_fp8_keys", context_fp8_keys)
        self._check_alike("recompute", recompute)
        self._check_alike("offload", offload)
        check_choice(offload, recompute)
        self._check_alike("schedule", schedule)
        schedule, scheme = _scheme(schedule, plan, self._context.topology, recompute, offload)
        self._check_works(schedule, scheme)
        self._check_alike("fp8", fp8)
        self._check_alike("fp8_all_gather", fp8_all_gather)
        check_placed(schedule, scheme, self._context.placement)
        start_alike(model, self._context)
        self._agree_on_tied()
        check_exchange(context_exchange)
        self.exchanges = exchanges(context_exchange, self._context.topology.cp_size)
        if len(self.exchanges) > 1 and plan.endswith(".json"):
            raise ValueError(
                f"context_exchange='auto' leaves to a search what plan={plan!r} was made for: say"
                f" context_exchange={' or '.join(map(repr, self.exchanges))}, as it was searched"
            )
        self._module = module
        self._lower = partial(
            lower,
            model,
            loss=loss,
            kernels=kernels,
            context_fp32_gradients=context_fp32_gradients,
            context_fp8_keys=context_fp8_keys,
            scheme=scheme,
            fp8=fp8,
            fp8_all_gather=fp8_all_gather,
        )
        self.fp8 = fp8
        self.narrower = narrower(
            self._context.topology,
            model.config.windows,
            fp8=fp8,
            fp8_all_gather=fp8_all_gather,
            context_fp8_keys=context_fp8_keys,
        )
        self._exchange = self.exchanges[0]
        self.undecided = recompute == AUTO and not plan.endswith(".json")
        self.offloads = offload == AUTO
        if recompute == AUTO:
            file = None if self.undecided else PlanFile.load(plan)
            recompute = "full" if file is None else file.recompute or USUAL
            if self.offloads:
                offload = ALL if file is None else file.offload
            elif file is not None and file.offload:
                raise ValueError(
                    f"plan={plan} was searched with slots on the host, for memory that would not do"
                    f" otherwise: say offload='{AUTO}' beside recompute='{AUTO}', or search again"
                )
        self.recompute: Recompute | ByLayer = recompute
        self.offload: Offload = offload
        self.chosen: ByLayer | None = None
        self.schedule = schedule
        lowered = self.lowered(recompute, offload)
        # A slot may be of another stage's layers alone.
        every = of_all_ranks((lowered.slots, lowered.inputs, lowered.keys), self._world)
        *known, keys = zip(*every, strict=True)
        slots, inputs = (frozenset().union(*sets) for sets in known)
        check_choices(recompute, slots)
        check_offload(offload, slots | inputs, sorted({*chain(*keys)}))
        self.structure = Structure(model)
        self._wanted: dict[str, bool] | None = None
        self.kernels = lowered.kernels
        self.places = [_place(key) for key in lowered.keys]
        builder = named_plan(plan, self.conditions)
        processors = self._context.processors(lowered.layers)
        lanes = make_lanes(self._context.device, processors=processors)
        logits, stage, ends = lowered.logits, lowered.stage, lowered.ends
        self.engine = Engine(lowered.layers, lanes, builder, logits, stage, module, ends)
        self.use_plan(plan, builder)

    def exchange(self, name: str) -> None:
        """Let keys and values come by another way from the next step on. Every rank must call this.

        The plans are those of the same builder.
        """
        self._exchange = name
        self._make_anew()
        self._agree(self._world)

    def travel(self, option: str, *, narrow: bool) -> None:
        """Let what an option of `narrower` names travel in 8 bits from the next step on, or not.

        Every rank must call this. The plans are those of the same builder.
        """
        assert option in self.narrower
        self._lower = partial(self._lower, **{option: narrow})
        self._make_anew()
        self._agree(self._world)

    def lowered(self, recompute: Recompute | ByLayer, offload: Offload) -> Lowered:
        """The operators of this rank with so much made again, and on the host: to look at."""
        return self._lower(recompute=recompute, offload=offload, context_exchange=self._exchange)

    def suited(self, layers: Sequence[GraphPair]) -> list[GraphPair]:
        """Such layers with the nominal costs of the sequences that plans are made for."""
        return [pair if self._length is None else pair.at(self._length) for pair in layers]

    @property
    def context(self) -> ParallelContext:
        """This rank's place among all."""
        return self._context

    def use_recompute(self, recompute: ByLayer, offload: Mapping[str, Slots] | None = None) -> None:
        """Let backward make other slots again from the next step on. Every rank must call this.

        The plans are those of the same builder.

        Args:
            recompute: what it makes again.
            offload: what waits on the host, by layer, where that is chosen as well; None to leave
                it.
        """
        self._check_alike("recompute", recompute)
        self.recompute, self.undecided, self.chosen = recompute, False, recompute
        if self.offloads and offload is not None:
            self._check_alike("offload", offload)
            self.offload = offload
        self._make_anew()
        self._agree(self._world)

    def _make_anew(self) -> None:
        """Make the operators anew, and the engine, with the builder of before."""
        lowered, before = self.lowered(self.recompute, self.offload), self.engine
        self.places = [_place(key) for key in lowered.keys]
        before.lanes.processors = self._context.processors(lowered.layers)
        self.engine = Engine(
            lowered.layers,
            before.lanes,
            before.builder,
            lowered.logits,
            lowered.stage,
            self._module,
            lowered.ends,
        )
        if self._length is not None:
            self.engine.suit(self._length)

    @property
    def conditions(self) -> dict[str, Any]:
        """What a plan file must have been made for to be used here."""
        dtype = self._model.transformer_config.params_dtype
        return conditions_of(self._context, self._model.config, dtype, self._micro_batch_size)

    def use_plan(self, name: str, builder: Builder) -> None:
        """Order operators by `builder` from the next step on. Every rank must call this.

        Raises:
            ValueError: ranks would order them differently, and wait for each other forever.
        """
        self.engine.install(builder)
        self.plan_in_use = name
        self._agree(self._world)

    def use_schedule(self, name: str, scheme: Scheme) -> None:
        """Let stages work in another order from the next step on. Every rank must call this.

        Args:
            name: of the schedule, as it was searched.
            scheme: makes schedules of the chunks as they lie.

        Raises:
            ValueError: ranks would work by different ones, and wait for each other forever.
        """
        self._check_works(name, scheme)
        self.schedule = name
        self._lower = partial(self._lower, scheme=scheme)
        self.engine.follow(scheme)
        self._agree(self._world)

    def check_frozen(self, group: dist.ProcessGroup | None) -> None:
        """Refuse that ranks of a stage have frozen other parameters than each other.

        Args:
            group: of the ranks that are asked.

        Raises:
            ValueError: on all ranks of it.
        """
        own = self._trained() if self._wanted is None else self._wanted
        first: dict[tuple[int, str], bool] = {}
        differing: set[str] = set()
        # An expert is compared on the ranks that hold it, by its number among all.
        for stage, trained in of_all_ranks((self._context.topology.pp_rank, own), group):
            differing |= {
                n
                for n, is_so in trained.items()
                if first.setdefault((stage, n), is_so) is not is_so
            }
        if differing:
            raise ValueError(
                f"'{min(differing)}' is frozen on some ranks only: requires_grad_ must do the same"
                " on all ranks"
            )

    def _trained(self) -> dict[str, bool]:
        """Whether each parameter requires a gradient, by its name among all ranks."""
        own = {name: p.requires_grad for name, p in self._model.named_parameters()}
        return ExpertNames(self._model).all_of(own)

    def follow_frozen(self, stage_group: dist.ProcessGroup | None) -> None:
        """Train what requires a gradient by now, before anything was made to train it with.

        Every rank must call this; `stage_group` are those of its stage.

        Raises:
            ValueError: on all ranks, when some have frozen other parameters than each other.
        """
        self.structure.check()
        self.check_frozen(stage_group)
        changed = self._agree_on_tied()
        if any(of_all_ranks(changed or bool(self.structure.changed), stage_group)):
            self.freeze_others(stage_group)

    @property
    def _is_apart(self) -> bool:
        """Whether the two layers that have one weight are on different stages."""
        return self._model.config.tie_embeddings and bool(self._context.placement.loop)

    @property
    def lacks_tied(self) -> bool:
        """Whether this rank has a copy of a tied weight that is frozen on another stage.

        It hears of it from there when that changes.
        """
        return self._model.tied_copy is not None and not self._model.trains_tied

    @property
    def wants_tied(self) -> bool:
        """Whether this rank is to train a weight that another stage has a copy of."""
        return self._is_apart and self._model.wants_tied

    def train_tied(self, trained: bool, stage_group: dist.ProcessGroup | None) -> None:
        """Let the gradient of a weight that stages share be exchanged from the next step on, or no
        more. The ranks of both stages must call this, by the same step.
        """
        has_it = self._model.embedding is not None or self._model.tied_copy is not None
        if self._is_apart and has_it and self._model.trains_tied is not trained:
            self._model.train_tied(trained)
            self._make_anew()
            self._agree(stage_group)

    def _agree_on_tied(self) -> bool:
        """Exchange the gradient of a tied weight if it is trained. Returns whether that changes.

        Every rank must call this. Where one stage has both layers, it sees for itself.
        """
        if not self._is_apart:
            return False
        before = self._model.trains_tied
        self._model.train_tied(any(of_all_ranks(self._model.wants_tied, self._world)))
        return self._model.trains_tied is not before

    def put_off(self) -> None:
        """Freeze again what was frozen at the last step, and nothing else, until it is refused."""
        self._wanted = self._trained()
        self.structure.freeze_as_then()

    def refuse_changes(self, has_changed: bool) -> NoReturn:
        """Refuse what some ranks of a stage train since their last step and others do not.

        Every rank must call this, and say whether it has changed something.

        Raises:
            ValueError: on all ranks.
        """
        self.check_frozen(self._world)
        every = enumerate(of_all_ranks(has_changed, self._world))
        ranks = ", ".join(str(rank) for rank, changed in every if changed)
        raise ValueError(
            f"what is trained, or the optimizer's groups, changed on rank {ranks} only:"
            " requires_grad_ and add_param_group must do the same on all ranks"
        )

    def freeze_others(self, stage_group: dist.ProcessGroup | None) -> None:
        """Make the operators anew, of which some train parameters that did not, or no longer do.

        Every rank of the stage, `stage_group`, must call this, between steps.
        """
        self.structure = Structure(self._model)
        self._make_anew()
        self._agree(stage_group)

    def _agree(self, group: dist.ProcessGroup | None) -> None:
        digests = " ".join(plan.digest for plan in self.engine.plans())
        stage, name = self._context.topology.pp_rank, self.plan_in_use
        if same_on_all_ranks(f"{name}: {digests}", group, stage=stage):
            raise ValueError(
                f"plan='{name}' orders the operators differently on different ranks: every"
                " rank must run the same model, plan and version"
            )

    def suit(self, length: int) -> None:
        """Make the plans for sequences of `length` tokens, if these are the first ones.

        Ranks whose batches are shorter take the longest of all; plans stay what they are after
        that, since a change would have to be agreed on in each step.
        """
        if self._length is None:
            self._length = int(largest(torch.tensor([length]), self._world))
            self.engine.suit(self._length)
            self.use_plan(self.plan_in_use, self.engine.builder)

    def _check_works(self, schedule: str, scheme: Scheme) -> None:
        """Refuse what ranks call alike, perhaps, and each has another of, by what is printed."""
        stages = self._context.topology.pp_size
        if same_on_all_ranks(f"{schedule}\n{content(scheme, stages)}", self._world):
            raise ValueError(
                f"schedule={schedule!r} has other works on other ranks: every rank must be given"
                " the same schedule, and the same file of one"
            )

    @property
    def _world(self) -> dist.ProcessGroup | None:
        return self._context.world_group

    def _check_alike(self, name: str, value: Any) -> None:
        """Ranks must send and receive the same things at the same places."""
        if same_on_all_ranks(str(value), self._world):
            raise ValueError(
                f"{name}={value!r} is another one on other ranks: every rank must run the same"
                " model with the same settings"
            )


def _scheme(
    schedule: str | None,
    plan: str,
    topology: Topology,
    recompute: Recompute | ByLayer = USUAL,
    offload: Offload = None,
) -> tuple[str, Scheme]:
    """The name of a schedule, and what makes it; `auto` is what a plan file was searched with."""
    stages = topology.pp_size
    if schedule != ANY or stages == 1:
        name = begun(schedule, stages, topology.shared, recompute, offload)
        return name, scheme_of(name, stages)
    known = PlanFile.load(plan).schedule if plan.endswith(".json") else {}
    if not known:
        raise ValueError(
            f"schedule='{ANY}' searches in the first steps of a Trainer: use the name of a"
            " schedule, or a plan file that was searched with it"
        )
    return restored(known, stages)


def _place(key: str) -> str:
    """What a user calls a layer, by its key; see `Lowered`."""
    return f"layer {key}" if key.isdigit() else key or "embedding"


def conditions_of(
    context: ParallelContext, config: ModelConfig, dtype: torch.dtype, micro_batch_size: int
) -> dict[str, Any]:
    """What a plan for this rank is made for; see `plan.file.conditions`."""
    sizes = context.topology.sizes
    return conditions(sizes, config, dtype, micro_batch_size, device_name(context))
