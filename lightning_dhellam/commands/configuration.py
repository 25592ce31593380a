"""What a run is configured by, checked before anything is made of it: recipe files and overrides.

LightningCLI reads both. It lets a blank stand for a value of any type, takes the last of two equal
keys, and replaces a mapping inside a mapping of which one key is overridden.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam import recipes
from lightning_dhellam.nearest import suggestion
from lightning_dhellam.values import annotation, conforms, kind, load_yaml, read_yaml

_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
_GPUS = ("gpu", "cuda")


def prepared(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The words of a command line, with recipes found and overrides inside mappings merged.

    Args:
        words: after the command.
        keys: that a configuration may have at its top.

    Raises:
        ValueError: a file cannot be used, or has a key that cannot be right.
    """
    found: list[str] = []
    tree: dict[str, Any] = {}
    for option, value, written in _options(words):
        if option in recipes.OPTIONS and value is not None:
            path = Path(value) if Path(value).exists() else recipes.find(value, option)
            _merge(tree, _checked(path, keys))
            found += [option, str(path)]
        else:
            merged = _merged(option, value, tree) if value is not None else None
            found += written if merged is None else merged
    return found


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Each option with its value, and as it was written."""
    left = list(words)
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if equals or not word.startswith("-") or not left or left[0].startswith("--"):
            yield option, value if equals else None, [word]
        else:
            yield option, left[0], [word, left.pop(0)]


def _checked(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What a file holds, once it is known to be a configuration."""
    try:
        tree = load_yaml(path)
        if not isinstance(tree, dict):
            shown = "is empty" if tree is None else f"is {tree!r:.40}"
            raise ValueError(f"{shown}, and must be a mapping with {', '.join(keys)}")
        for key in tree:
            if key not in keys:
                raise ValueError(f"unknown key '{key}'{suggestion(str(key), keys)}")
        for place, node in _nodes("", tree):
            for key in node:
                if "class_path" in node and key not in _OF_A_CLASS:
                    raise ValueError(
                        f"unknown key '{key}' beside {place}class_path"
                        f"{suggestion(str(key), _OF_A_CLASS)}"
                    )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tree


def _nodes(place: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping inside `value`, with what stands before its keys."""
    if isinstance(value, Mapping):
        yield place, value
        for key, one in value.items():
            yield from _nodes(f"{place}{key}.", one)
    elif isinstance(value, list):
        for one in value:
            yield from _nodes(place, one)


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _merged(option: str, text: str, tree: dict[str, Any]) -> list[str] | None:
    """An override of one key deep inside a mapping, as one of all that is at its first key.

    None for any other: of an argument, say, or of a mapping's own key.
    """
    # `--model.init_args.overrides` is another way to write `--model.overrides`.
    names = [name for name in option.removeprefix("--").split(".") if name != "init_args"]
    node: Any = tree
    for depth, name in enumerate(names):
        if not isinstance(node, dict):
            return None
        if "class_path" in node and name not in _OF_A_CLASS:
            function = constructor(str(node["class_path"]))
            node = node.setdefault("init_args", {})
            if function is not None and _is_mapping(function, name) and len(names) > depth + 2:
                return _replaced(names[: depth + 2], names[depth + 2 :], text, node, name)
        node = node.get(name)
    return None


def _replaced(
    shown: Sequence[str], rest: Sequence[str], text: str, arguments: dict[str, Any], name: str
) -> list[str]:
    mapping = arguments[name] = dict(arguments.get(name) or {})
    node = mapping
    for key in (shown[-1], *rest[:-1]):
        node[key] = dict(node[key]) if isinstance(node.get(key), Mapping) else {}
        node = node[key]
    node[rest[-1]] = read_yaml(text)
    return [f"--{'.'.join(shown)}={json.dumps(mapping[shown[-1]])}"]


def constructor(class_path: str) -> Callable[..., Any] | None:
    """The `__init__` of a class by its path, or None if there is no such class."""
    module, _, name = class_path.rpartition(".")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name).__init__
    except (ImportError, AttributeError, ValueError):
        return None
    return found


def _is_mapping(function: Callable[..., Any], name: str) -> bool:
    parameter = inspect.signature(function).parameters.get(name)
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return False
    hint = annotation(parameter, function)
    return conforms({}, hint) and not conforms("", hint)


def refuse_blanks(config: Mapping[str, Any], trainer: Callable[..., Any]) -> None:
    """Refuse a blank where a value is needed, by name.

    Args:
        config: of a run, parsed, with defaults.
        trainer: the constructor that the arguments of `trainer` are for.

    Raises:
        ValueError: with the name and the kind of value that is wanted.
    """
    if "seed_everything" in config and config["seed_everything"] is None:
        raise ValueError("seed_everything is blank: give it a whole number, or leave it out")
    _refuse_blanks("trainer", config.get("trainer") or {}, trainer)
    for name in config:
        if name != "trainer":
            _inside(name, config[name])


def _inside(place: str, value: Any) -> None:
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        function = constructor(value["class_path"])
        if function is not None:
            _refuse_blanks(place, value.get("init_args") or {}, function)
    elif isinstance(value, Mapping):
        for name, one in value.items():
            _inside(f"{place}.{name}", one)
    elif isinstance(value, list):
        for one in value:
            _inside(place, one)


def _refuse_blanks(place: str, arguments: Mapping[str, Any], function: Callable[..., Any]) -> None:
    for name, parameter in inspect.signature(function).parameters.items():
        if arguments.get(name, ...) is None and parameter.default is not None:
            hint = annotation(parameter, function)
            if not conforms(None, hint):
                raise ValueError(f"{place}.{name} is blank: give it {kind(hint)}, or leave it out")
    for name, value in arguments.items():
        _inside(f"{place}.{name}", value)


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Refuse more GPUs than this machine has, before Lightning does."""
    count = torch.cuda.device_count()
    if trainer.get("accelerator") not in _GPUS:
        return
    if not count:
        raise ValueError(
            f"trainer.accelerator={trainer['accelerator']}, but torch sees no GPU on this machine:"
            " run it where there are some, or try the CPU with a small model, as"
            " 'dhellam fit --config llama-tiny-2cpu' does"
        )
    wanted = trainer.get("devices")
    if isinstance(wanted, int) and wanted > count:
        raise ValueError(
            f"trainer.devices={wanted}, but torch sees {count} GPU(s) on this machine: use"
            f" --trainer.devices {count}, or several nodes with --trainer.num_nodes"
        )
