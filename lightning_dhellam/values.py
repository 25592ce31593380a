"""What a user has written, read and checked: YAML, and values of the kind that a signature says."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lightning_dhellam.nearest import suggestion

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    timedelta: "a datetime.timedelta",
    type(None): "nothing",
}
_LISTS = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)


class _Loader(yaml.SafeLoader):
    """Reads numbers as people write them, and takes no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                place = f"line {key_node.start_mark.line + 1}"
                raise ValueError(f"{place} gives '{key}' a second time: leave one of them out")
            seen.add(key)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


# YAML 1.1 takes 370e9 and 1e-5, without a point or a sign, for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """What YAML says. 370e9 and 1e-5 are numbers.

    Raises:
        ValueError: it is not YAML, or a mapping has a key twice; in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


def load_yaml(path: Path) -> Any:
    """What a YAML file says; see `read_yaml`.

    Raises:
        ValueError: as `read_yaml`, or the file cannot be read; the message is without its name.
    """
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(str(error.strerror)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error


def check_kinds(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments of another kind than the annotations of `function` say, by their names.

    `given` may hold more than the arguments: `locals()` at the start of a function does. A value
    of nothing is refused as all others are, unless the annotation allows it.

    Raises:
        ValueError: with the name, the value and the kind that is wanted.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        if name in given:
            check_kind(name, given[name], annotation(parameter, function))


def annotation(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    """What the annotation of a parameter stands for; Any where its names are for types only."""
    hint = parameter.annotation
    if isinstance(hint, str):
        try:
            return eval(hint, function.__globals__)
        except NameError:
            return Any
    return hint


def check_fields(instance: Any) -> None:
    """Refuse fields of a dataclass that are of another kind than it says; see `check_kinds`."""
    own: Any = type(instance)
    for name, hint in _hints(own).items():
        if name in instance.__dict__:
            check_kind(name, instance.__dict__[name], hint)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def check_kind(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the kind that an annotation says; see `check_kinds`."""
    if conforms(value, hint):
        return
    if value is None:
        raise ValueError(f"{name} is blank: give it {kind(hint)}, or leave it out")
    raise ValueError(f"{name}={value!r} must be {kind(hint)}")


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that an annotation says.

    As people write them: a whole number is a number too, and a list may stand for a tuple; but
    true is no number, and text is no list.
    """
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(conforms(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in _LISTS or hint in _LISTS:
        return _is_list(value, origin or hint, inner)
    if origin in _MAPPINGS or hint in _MAPPINGS:
        parts = inner or (Any, Any)
        return isinstance(value, Mapping) and all(
            conforms(key, parts[0]) and conforms(one, parts[1]) for key, one in value.items()
        )
    if hint in (int, float):
        number = Integral if hint is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    if hint is None:
        return value is None
    plain = origin or hint
    return not isinstance(plain, type) or isinstance(value, plain)


def _is_list(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return False
    if origin is tuple and inner and inner[-1] is not ...:
        return len(value) == len(inner) and all(map(conforms, value, inner))
    return not inner or all(conforms(one, inner[0]) for one in value)


def kind(hint: Any) -> str:
    """What an annotation says, in words: `a whole number`."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(one) for one in inner if one is not type(None)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple and inner and inner[-1] is not ...:
        return f"a list of {len(inner)}: {', '.join(map(kind, inner))}"
    if origin in _LISTS or hint in _LISTS:
        return f"a list, of {kind(inner[0])} each" if inner else "a list"
    if origin in _MAPPINGS or hint in _MAPPINGS:
        return f"a mapping from {kind(inner[0])} to {kind(inner[1])}" if inner else "a mapping"
    return "anything" if hint is Any else f"of type {getattr(hint, '__name__', hint)}"


def plainly(message: str, options: Sequence[str]) -> str:
    """What a parser says, on one line, with the option nearest to one that it does not know.

    Args:
        message: of the parser.
        options: that it has, as they are typed.
    """
    line = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", line)
    return line + (suggestion(unknown[1], options) if unknown else "")


_UNITS = {"": 2.0**30, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}
_UNITS |= {"MB": 1e6, "GB": 1e9, "TB": 1e12}


def memory_bytes(name: str, value: float | str) -> int:
    """The bytes that an amount of memory stands for: a number of GiB, or text such as `40GiB`.

    Args:
        name: what the user calls the amount.
        value: as the user wrote it; units are MiB, GiB and TiB, or MB, GB and TB of powers of ten.

    Raises:
        ValueError: it is no amount above 0.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(found[2].upper()) if found else None
    if isinstance(value, bool) or found is None or unit is None or not float(found[1]):
        raise ValueError(
            f"{name}={value!r} must be an amount of memory above 0: a number of GiB, or text such"
            " as '40GiB' or '80GB'"
        )
    return round(float(found[1]) * unit)
