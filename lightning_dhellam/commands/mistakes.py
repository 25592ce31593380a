"""What jsonargparse finds wrong with a configuration, said in one line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from importlib import import_module

from lightning_dhellam.commands.configuration import constructor
from lightning_dhellam.nearest import suggestion

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "",
}
_UNKNOWN = re.compile(r"unrecognized arguments: ([^\s=]+)|does not accept option '([^']+)'")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_EXPECTED = re.compile(r"Expected an? <class '([\w.]+)'>")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*?)\]")
_GOT = re.compile(r"(?:Got value|Given value): (.*)")
_NESTED = re.compile(r"NestedArg\(key='[^']*', val='?(.*?)'?\)$")


def one_line(message: str, options: Sequence[str], command: str) -> str:
    """The mistake that a message of several lines is about, with the nearest right name.

    Args:
        message: of jsonargparse; one that is not known is put on one line as it is.
        options: of the command, such as `trainer.max_steps`.
        command: `fit` and so on.
    """
    unknown = _UNKNOWN.search(message)
    if unknown:
        return _unknown_option(unknown[1] or unknown[2], options)
    missing = re.fullmatch(_REQUIRED, message.strip())
    if missing:
        names = [name.removeprefix(f"{command}.") for name in missing[1].split(", ")]
        return (
            f"no {' and no '.join(names)}: give --config with a file or the name of a recipe"
            " (dhellam recipes), or these themselves"
        )
    if _KEY.search(message):
        return _wrong_value(message)
    return " ".join(message.split())


def _unknown_option(given: str, options: Sequence[str]) -> str:
    if not given.startswith("-") and "." not in given:
        return f"'{given}' stands behind no option: did you mean --config {given}?"
    name = given.lstrip("-").removesuffix("+")
    dashes = given[: len(given) - len(given.lstrip("-"))]
    tail = name.rpartition(".")[2]
    same = [option for option in options if option.rpartition(".")[2] == tail]
    hint = suggestion(name, same) or suggestion(name, options)
    if hint and dashes:
        hint = hint.replace("'", f"'{dashes}", 1)
    return f"{given} is not known{hint}" if hint else f"{given} is not known: see --help"


def _wrong_value(message: str) -> str:
    """A value that is wrong, or an argument of a class that is."""
    keys = _KEY.findall(message)
    found = _CLASS.search(message)
    if found is None:
        return f"{keys[0]}{_kinds(message)}"
    reason = message[found.end() :]
    # What follows is about other types that the value might have been of.
    reason = reason.split("\n    - ")[0]
    option, required, inner = (p.search(reason) for p in (_OPTION, _REQUIRED, _KEY))
    if option:
        return f"{keys[0]}.{option[1]} is no argument of {found[1]}{_nearest(option[1], found[1])}"
    if required:
        names = " and ".join(f"{keys[0]}.{name}" for name in required[1].split(", "))
        return f"{names} must be given: {found[1]} needs it, and it is missing or blank"
    if inner:
        return f"{keys[0]}.{inner[1]}{_kinds(reason)}"
    return f"{keys[0]}: class_path '{found[1]}': {' '.join(reason.strip(': ').split())}" + (
        _nearest_class(found[1])
    )


def _kinds(reason: str) -> str:
    """`=value must be a whole number`, of what was expected."""
    literals = _LITERAL.findall(reason)
    kinds = [_WORDS.get(kind, kind) for kind in _EXPECTED.findall(reason)]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind]
    if literals:
        kinds = [f"one of {', '.join(literals)}"]
    got = _GOT.findall(reason)
    if "dot import path" in reason and got:
        return f"={got[-1].strip()} is no class: give it with its module, as package.module.Class"
    if not kinds or not got:
        return f": {' '.join(reason.split())}"
    nested = _NESTED.search(got[-1])
    return f"={nested[1] if nested else got[-1].strip()} must be {' or '.join(kinds)}"


def _nearest(option: str, class_path: str) -> str:
    function = constructor(class_path)
    names = list(inspect.signature(function).parameters)[1:] if function is not None else []
    hint = suggestion(option, names)
    return hint or (f": it has {', '.join(names)}" if names else "")


def _nearest_class(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    try:
        return suggestion(name, dir(import_module(module)))
    except (ImportError, ValueError):
        return ""
