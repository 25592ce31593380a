"""A plan: the total issue order of a forward graph and a backward graph, as plain data.

A plan prints as a table and parses back from its own print:

    plan interleaved: forward transformer, backward transformer
      0  forward   compute  attention.norm
      1  backward  tp       fc2.grad_gather
      2  backward  compute  fc1.wgrad (previous)
      -  barrier
      3  forward   tp       qkv.gather (first)
      4  backward  compute  fc1.dgrad (spare)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_dhellam.plan.operator import Lane, Strand


class PlanError(ValueError):
    """A plan that cannot be used. The message holds the table with an arrow at the row."""


@dataclass(frozen=True, slots=True)
class Issue:
    """Row of a plan: issue this operator of this strand now.

    With `lag` 1 it is the operator of the previous pair of layers, which was left over for this
    one, so that work which nobody waits for can hide this pair's first communication.

    Communication with `first` begins before the compute operator that is issued next: a kernel
    that runs has taken the processors that it wants, and what comes later waits for its end. A
    GEMM with `spare` leaves as many processors free as communication needs.
    """

    strand: Strand
    lane: Lane
    operator: str
    lag: int = 0
    first: bool = False
    spare: bool = False

    def __str__(self) -> str:
        remarks = _PREVIOUS * bool(self.lag) + _FIRST * self.first + _SPARE * self.spare
        return f"{self.strand:<8}  {self.lane:<7}  {self.operator}{remarks}"


@dataclass(frozen=True, slots=True)
class Barrier:
    """Row of a plan: every lane waits for every other lane."""

    def __str__(self) -> str:
        return "barrier"


Row = Issue | Barrier

_HEADER = re.compile(r"plan (\S+): forward (\S+), backward (\S+)")
_ISSUE = re.compile(r"(\d+)\s+(\S+)\s+(\S+)\s+(\S+)( \(previous\))?( \(first\))?( \(spare\))?")
_BARRIER = re.compile(r"-\s+barrier")
_NOTHING = "-"
_PREVIOUS = " (previous)"
_FIRST = " (first)"
_SPARE = " (spare)"


@dataclass(frozen=True)
class Plan:
    """When each operator of a pair of graphs is issued. It decides when, never what.

    Attributes:
        name: of the builder, or of the search that made it.
        forward: name of the forward graph, None for a visit without forward strand.
        backward: name of the backward graph, None for a visit without backward strand.
        rows: in issue order.
    """

    name: str
    forward: str | None
    backward: str | None
    rows: tuple[Row, ...]

    @property
    def issues(self) -> tuple[Issue, ...]:
        """The rows that issue an operator."""
        return tuple(row for row in self.rows if isinstance(row, Issue))

    @property
    def digest(self) -> str:
        """Identifies the order of operators: the same on every rank, or collectives dead-lock."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self.table()

    def table(self, arrow_at: int | None = None, remark: str = "") -> str:
        """The plan as text, with an arrow and a remark at row `arrow_at`.

        It is an index of `rows`: -1 is the header, `len(rows)` the end.
        """
        return "\n".join(self._lines(arrow_at, remark))

    def _lines(self, arrow_at: int | None, remark: str) -> Iterator[str]:
        arrow = f"   <-- {remark}"
        header = (
            f"plan {self.name}: forward {self.forward or _NOTHING},"
            f" backward {self.backward or _NOTHING}"
        )
        yield header + arrow * (arrow_at == -1)
        number = 0
        for index, row in enumerate(self.rows):
            if isinstance(row, Issue):
                label, number = str(number), number + 1
            else:
                label = _NOTHING
            yield f"{label:>3}  {row}" + arrow * (index == arrow_at)
        if arrow_at == len(self.rows):
            yield f"  {arrow}"

    def error(self, index: int, remark: str) -> PlanError:
        """An error about row `index`; -1 is the header, `len(rows)` the end of the plan."""
        return PlanError(f"invalid plan: {remark}\n{self.table(index, remark)}")

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan from its own print. Raises `PlanError` with an arrow at the bad line."""
        lines = [line.rstrip() for line in text.strip().splitlines()]
        header = _HEADER.fullmatch(lines[0]) if lines else None
        if header is None:
            raise _parse_error(lines, 0, "expected 'plan NAME: forward GRAPH, backward GRAPH'")
        name, forward, backward = (None if g == _NOTHING else g for g in header.groups())
        rows: list[Row] = []
        issued = 0
        for index, line in enumerate(lines[1:], start=1):
            row = _parse_row(lines, index, line.strip(), issued)
            issued += isinstance(row, Issue)
            rows.append(row)
        return cls(str(name), forward, backward, tuple(rows))


def _parse_row(lines: list[str], index: int, line: str, issued: int) -> Row:
    if _BARRIER.fullmatch(line):
        return Barrier()
    match = _ISSUE.fullmatch(line)
    if match is None:
        raise _parse_error(lines, index, "expected 'NUMBER STRAND LANE OPERATOR' or '- barrier'")
    number, strand, lane, operator, previous, first, spare = match.groups()
    if int(number) != issued:
        raise _parse_error(lines, index, f"row number {number}, expected {issued}")
    if strand not in list(Strand):
        raise _parse_error(lines, index, f"strand '{strand}', expected {_choices(Strand)}")
    if lane not in list(Lane):
        raise _parse_error(lines, index, f"lane '{lane}', expected {_choices(Lane)}")
    lag = 1 if previous else 0
    return Issue(Strand(strand), Lane(lane), operator, lag, bool(first), bool(spare))


def _choices(values: Iterable[str]) -> str:
    return " or ".join(f"'{value}'" for value in values)


def _parse_error(lines: list[str], index: int, remark: str) -> PlanError:
    marked = [f"{line}   <-- {remark}" if i == index else line for i, line in enumerate(lines)]
    return PlanError("\n".join([f"not a plan: {remark}", *(marked or ["(empty text)"])]))
