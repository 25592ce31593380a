"""Files that are whole or absent, readable, and refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_dhellam.staging import write_atomically

_MARKS = {"plan file": "plans", "profile": "timings"}
"""A field that each kind of file has, and no other kind."""
_SPELLINGS = {
    "sizes.tp": "tensor_parallel_size",
    "sizes.pp": "pipeline_parallel_size",
    "sizes.dp": "the number of data-parallel ranks",
}
"""What the user calls a field; those of `shapes` have the names of the model's configuration."""


class FileError(ValueError):
    """A file that cannot be used. The message says why and what to do."""


def save_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    save_bytes(path, text.encode())


def save_bytes(path: Path, data: bytes) -> None:
    """Write beside `path`, whose folder is made, and rename, so that nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def load_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The fields of a JSON file that says `"format": version`.

    Raises:
        FileError: it is absent, broken, not a `kind` ("plan file", "profile"), or of another
            format.
    """
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read as a {kind}: {error.strerror}") from error
    except ValueError as error:
        raise FileError(f"{path} is not a whole {kind} ({error}): make it again") from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise FileError(f"{path} is not a {kind}: it has no field 'format'")
    for other, mark in _MARKS.items():
        if other != kind and mark in fields:
            raise FileError(
                f"{path} is a {other}, but a {kind} is wanted: a search writes both, profile.json"
                " and plan.json"
            )
    if fields["format"] != version:
        raise FileError(
            f"{path} has format {fields['format']} and this version reads {version}: make it again"
        )
    return fields


def put_in_lines(fields: Mapping[str, Any], flat: tuple[str, ...] = ()) -> str:
    """JSON, indented; the entries of the lists named in `flat` take one line each."""
    parts = []
    for name, value in fields.items():
        if name in flat:
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            text = f"[\n{rows}\n  ]" if value else "[]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Each differing field with both values, in the user's spelling where there is one."""
    return list(_differences(found, expected, ""))


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any], at: str) -> Iterator[str]:
    for name in dict.fromkeys([*found, *expected]):
        mine, yours = found.get(name), expected.get(name)
        if isinstance(mine, Mapping) and isinstance(yours, Mapping):
            yield from _differences(mine, yours, f"{at}{name}.")
        elif mine != yours:
            yield f"{_spelt(at + name)} is {_shown(mine)} in the file and {_shown(yours)} here"


def _spelt(name: str) -> str:
    return _SPELLINGS.get(name, name.removeprefix("shapes."))


def _shown(value: Any) -> str:
    return "absent" if value is None else repr(value)
