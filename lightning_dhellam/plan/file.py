"""Plans in a file that a person can read and another run can use, or refuses with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dhellam.files import (
    FileError,
    differences,
    load_json,
    put_in_lines,
    save_text,
)
from lightning_dhellam.plan import (
    BUILDERS,
    Builder,
    Graph,
    Kind,
    Plan,
    PlanError,
    builder,
    kind_of,
    validate,
)
from lightning_dhellam.plan.by_layer import ByLayer
from lightning_dhellam.plan.graph import kind_in
from lightning_dhellam.plan.offloading import Slots

FORMAT = 1
_SHAPES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)


def conditions(
    sizes: Mapping[str, int],
    config: Any,
    dtype: Any,
    micro_batch_size: int,
    device: str | None = None,
) -> dict[str, Any]:
    """What a plan is made for, as far as it is known before the first batch.

    Args:
        sizes: ranks by parallelism: `tp`, `pp`, `cp`, `ep`, `dp`.
        config: of the model; its sizes are read by their names.
        dtype: of weights and activations, such as `torch.bfloat16`.
        micro_batch_size: samples that go through the layers together.
        device: name of the device; None, before there are processes, leaves it out.
    """
    shapes = {name: getattr(config, name) for name in _SHAPES}
    return {
        **({} if device is None else {"device": device}),
        "sizes": dict(sizes),
        "shapes": {**shapes, "micro_batch_size": micro_batch_size},
        "dtype": str(dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class PlanFile:
    """Plans of a model and what they were made for.

    Attributes:
        plans: by the fingerprints of the forward and the backward graph, empty for none.
        graphs: `transformer forward` and the like, by fingerprint.
        conditions: sizes, shapes, device, dtype: what must be equal where the plans are used.
        versions: of the packages that made it, for the reader only.
        notes: predicted and measured times and the like, for the reader only.
        recompute: what backward makes again, where that was chosen for these plans; see
            `plan.by_layer`.
        offload: what waits on the host by then, where that was chosen as well; see
            `plan.offloading`.
        schedule: order of the pipeline's works, where that was chosen with these plans; see
            `pipeline.schedules.kept`.
    """

    plans: Mapping[Kind, Plan]
    graphs: Mapping[str, str]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    recompute: ByLayer = field(default_factory=dict)
    offload: Mapping[str, Slots] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plans: Mapping[Kind, Plan],
        graphs: Iterable[Graph],
        *,
        conditions: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> PlanFile:
        """A plan file of solved plans. `graphs` are those of the model, in any order."""
        used = {fingerprint for kind in plans for fingerprint in kind if fingerprint}
        named = {g.fingerprint: str(g) for g in graphs if g.fingerprint in used}
        assert used <= set(named), "plans of graphs that are not given"
        return cls(plans, named, conditions or {}, versions or {}, notes or {})

    @property
    def fields(self) -> dict[str, Any]:
        """What a file has of it, as plain values."""
        return {
            "format": FORMAT,
            "conditions": self.conditions,
            "versions": self.versions,
            "notes": self.notes,
            "recompute": self.recompute,
            "offload": self.offload,
            "schedule": self.schedule,
            "graphs": self.graphs,
            "plans": [
                {"forward": forward, "backward": backward, "table": str(plan).splitlines()}
                for (forward, backward), plan in self.plans.items()
            ],
        }

    def save(self, path: Path | str) -> None:
        """Write it, whole or not at all."""
        save_text(Path(path), put_in_lines(self.fields))

    @classmethod
    def load(
        cls, path: Path | str, *, expected_conditions: Mapping[str, Any] | None = None
    ) -> PlanFile:
        """Read a plan file.

        Raises:
            FileError: it is not a whole plan file, or was made under other conditions: each
                differing field is named with both values.
        """
        loaded = cls.of_fields(load_json(Path(path), "plan file", FORMAT), path)
        if expected_conditions is not None:
            loaded.check(expected_conditions, path)
        return loaded

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any], path: Path | str) -> PlanFile:
        """Plans of what `fields` is; `path` is what they came from.

        Raises:
            FileError: something is missing, or is no plan.
        """
        try:
            plans = {
                (row["forward"], row["backward"]): Plan.parse("\n".join(row["table"]))
                for row in fields["plans"]
            }
            names = ("graphs", "conditions", "versions", "notes")
            parts = {name: fields[name] for name in names}
            later = {name: fields.get(name, {}) for name in ("recompute", "offload", "schedule")}
            if not isinstance(later["offload"], Mapping):
                raise TypeError("'offload' must have slots by layer")
            return cls(plans, **parts, **later)
        except PlanError as error:
            raise FileError(f"{path} holds a plan that cannot be read: {error}") from error
        except (KeyError, TypeError) as error:
            raise FileError(f"{path} is not a whole plan file ({error}): search again") from error

    def check(self, expected_conditions: Mapping[str, Any], path: Path | str) -> None:
        """Refuse plans that were made under other conditions; `path` is what they came from.

        Raises:
            FileError: names each differing field with both values.
        """
        # A file without conditions, written by hand say, promises nothing.
        found = differences(self.conditions, expected_conditions) if self.conditions else []
        if found:
            raise FileError(
                f"{path} was made under other conditions: {'; '.join(found)}."
                " Search again, or use a built-in plan"
            )

    def __str__(self) -> str:
        return "\n\n".join(str(plan) for plan in self.plans.values())

    def builder(self, fallback: Builder = BUILDERS["interleaved"]) -> Builder:
        """Gives these plans to an engine.

        Graphs of names that the file does not know, such as those of prediction, and pairs that
        it has no plan for get the plan of `fallback`.

        Raises (the builder):
            FileError: a graph of a known name has changed since the plans were made.
        """
        known: dict[str, dict[str, str]] = {}
        for fingerprint, name in self.graphs.items():
            known.setdefault(_kind(name), {})[fingerprint] = name

        def build(forward: Graph | None, backward: Graph | None) -> Plan:
            for graph in (forward, backward):
                made_for = known.get(_kind(str(graph))) if graph else None
                if graph is not None and made_for and graph.fingerprint not in made_for:
                    raise FileError(_stale(graph, made_for))
            plan = self.plans.get(kind_of(forward, backward))
            if plan is None:
                return fallback(forward, backward)
            validate(plan, forward, backward)
            return plan

        return build


def _kind(name: str) -> str:
    """The kind of a graph, and its direction: of its name without what is made again."""
    name, _, direction = name.rpartition(" ")
    return f"{kind_in(name)} {direction}"


def _stale(graph: Graph, made_for: Mapping[str, str]) -> str:
    """Why plans for graphs of these names, by fingerprint, are not for `graph`."""
    same = sorted(fingerprint for fingerprint, name in made_for.items() if name == str(graph))
    if not same:
        return (
            f"the plan file is for {' and '.join(sorted({*made_for.values()}))}, and the model has"
            f" '{graph}', which makes other slots again or has others on the host: use the same"
            " recompute and offload, search again, or use a built-in plan"
        )
    return (
        f"the plan file is stale: its '{graph}' has fingerprint {' or '.join(same)}, the model's"
        f" has {graph.fingerprint}. Search again, or use a built-in plan"
    )


def builder_from(
    path: Path | str,
    *,
    expected_conditions: Mapping[str, Any] | None = None,
    fallback: Builder = BUILDERS["interleaved"],
) -> Builder:
    """The builder of a plan file's plans. Arguments and errors as for `PlanFile`."""
    return PlanFile.load(path, expected_conditions=expected_conditions).builder(fallback)


def named_plan(plan: str, conditions: Mapping[str, Any] | None = None) -> Builder:
    """The built-in plan of that name, or the plans of a file whose name ends in `.json`.

    Args:
        plan: name or path.
        conditions: what a file must have been made for, if it says so.

    Raises:
        ValueError: an unknown name, or a file that cannot be used.
    """
    if plan.endswith(".json"):
        return builder_from(plan, expected_conditions=conditions)
    return builder(plan)
