"""A profile: measured times of the operators of some graphs, in a file that people can read.

Operators that do the same work share one key. A key has a row of its own time, and two rows, one
each way, for every other key that it was measured beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path

from lightning_dhellam.files import (
    FileError,
    differences,
    load_json,
    put_in_lines,
    save_text,
)
from lightning_dhellam.plan import Graph, Lane
from lightning_dhellam.search.measure.clock import Clock
from lightning_dhellam.search.measure.graphfile import fields_of, graph_from
from lightning_dhellam.search.measure.rows import Key, Timing
from lightning_dhellam.search.measure.transfers import Transfer

FORMAT = 5
_OLDER = 3, 4
"""3 has no rows of two communications: nothing is known of how they disturb each other. Neither
says in which 8 bits an operator computes."""


@dataclass(frozen=True)
class Fingerprint:
    """The conditions that a profile was measured under, and so is valid for.

    Attributes:
        device: name of the device.
        versions: of the libraries that run operators, by package.
        sizes: numbers of ranks: `world`, `tp`, `dp` and the like.
        shapes: of the model and a micro-batch: `hidden`, `sequence`, `tokens` and the like.
        dtype: of activations.
        graphs: names of the profiled graphs by their fingerprints.
        kernels: backends of the operators, by operator.
    """

    device: str
    versions: Mapping[str, str]
    sizes: Mapping[str, int]
    shapes: Mapping[str, int]
    dtype: str
    graphs: Mapping[str, str]
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Measured times of the operators of some graphs.

    Attributes:
        fingerprint: conditions that it is valid for.
        operators: key of each operator, by graph fingerprint and operator name.
        lanes: lane of each key.
        timings: rows of operators alone and beside one another.
        launch: seconds the host needs to issue one operator.
        graphs: the graphs that were measured: of every kind of layer a forward and a backward one.
        inline: whether compute ran on the host, as it does on CPU; see `model.Costs`.
        spares: for each operator that was also measured leaving processors to communication, the
            key of those times by its own key.
        clock: how the device slows down when it computes for long.
        routings: seconds of the operators whose time depends on what values say, by the routing
            that `timings` are of and by further ones of the run; nothing where none does.
        transfers: of what this stage sends to its neighbours; nothing in profiles that were taken
            before these were measured, and where there is one stage.
    """

    fingerprint: Fingerprint
    operators: Mapping[str, Mapping[str, Key]]
    lanes: Mapping[Key, Lane]
    timings: tuple[Timing, ...]
    launch: float = 0.0
    graphs: tuple[Graph, ...] = ()
    inline: bool = False
    spares: Mapping[Key, Key] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    routings: tuple[Mapping[Key, float], ...] = ()
    transfers: tuple[Transfer, ...] = ()

    def save(self, path: Path | str) -> None:
        """Write the profile to a file, whole or not at all."""
        fields = {
            "format": FORMAT,
            "fingerprint": asdict(self.fingerprint),
            "launch": self.launch,
            "inline": self.inline,
            "clock": asdict(self.clock),
            "spares": dict(self.spares),
            "operators": {name: dict(keys) for name, keys in self.operators.items()},
            "lanes": dict(self.lanes),
            "timings": [asdict(row) for row in self.timings],
            "routings": [dict(seconds) for seconds in self.routings],
            "transfers": [asdict(row) for row in self.transfers],
            "graphs": [fields_of(graph) for graph in self.graphs],
        }
        save_text(
            Path(path), put_in_lines(fields, flat=("timings", "routings", "transfers", "graphs"))
        )

    @classmethod
    def load(cls, path: Path | str, expected: Fingerprint | None = None) -> Profile:
        """Read a profile that was measured under the conditions of `expected`, if those are given.

        Raises:
            FileError: the file is not a whole profile, or was measured under other conditions;
                every differing field is named with both values.
        """
        fields = load_json(Path(path), "profile", FORMAT, *_OLDER)
        try:
            profile = cls(
                Fingerprint(**fields["fingerprint"]),
                fields["operators"],
                {key: Lane(lane) for key, lane in fields["lanes"].items()},
                tuple(Timing(**row) for row in fields["timings"]),
                float(fields["launch"]),
                tuple(graph_from(row) for row in fields["graphs"]),
                bool(fields["inline"]),
                fields.get("spares", {}),
                Clock(**fields.get("clock", {})),
                tuple(fields.get("routings", ())),
                tuple(Transfer(**row) for row in fields.get("transfers", ())),
            )
            profile._check()
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise FileError(f"{path} is not a whole profile ({error}): measure again") from error
        if fields["format"] != FORMAT and any(graph.of_step for graph in profile.graphs):
            raise FileError(
                f"{path} was measured in 8 bits by an older version, which did not note in which"
                " format: measure again"
            )
        if expected is not None:
            found = differences(asdict(profile.fingerprint), asdict(expected))
            if found:
                raise FileError(
                    f"{path} was measured under other conditions: {'; '.join(found)}."
                    " Delete it to measure again"
                )
        return profile

    def _check(self) -> None:
        """Raise if an operator has no time of its own, or a graph is not the one measured."""
        alone = {row.operator for row in self.timings if row.partner is None}
        needed = {key for keys in self.operators.values() for key in keys.values()}
        missing = needed - (alone & set(self.lanes))
        if missing:
            raise ValueError(f"no time of '{min(missing)}'")
        for seconds in self.routings:
            if seconds.keys() != self.routings[0].keys() or not seconds.keys() <= alone:
                raise ValueError("routings are not of the operators that were measured")
            if not all(0 < value < inf for value in seconds.values()):
                raise ValueError(f"a routing takes {min(seconds.values())} s")
        for row in self.transfers:
            if not (row.bytes > 0 and 0 < row.seconds < inf and 0 < row.beside < inf):
                raise ValueError(f"a transfer of {row.bytes} bytes takes {row.seconds} s")
        for graph in self.graphs:
            if graph.fingerprint not in self.operators:
                raise ValueError(f"graph '{graph}' is not the one that was measured")
