#!/usr/bin/env bash
# jsonargparse 4.53.0, seen 2026-11-30.
#
# An argument of type `dict[str, Any]`, a mapping inside it from a configuration file, and one override
# on the command line. `--model.layers 4`, one level deep, changes that key, keeps all others, and
# gives the number 4. `--model.rope.base 500000.0`, two levels deep, replaces the whole inner mapping:
# `factor` is gone, and the value is the text "500000.0". We expected the second to do what the first
# does, one level further down.
#
# Why it matters: LightningCLI recipes are overridden so. A run trains with the default of every
# neighbour of what was overridden, and without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jsonargparse==4.53.0
cd "$folder"
cat > recipe.yaml <<'YAML'
model: {rope: {base: 10000.0, factor: 8.0}, layers: 2}
YAML
venv/bin/python - <<'PYTHON'
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser

parser = ArgumentParser()
parser.add_argument("--config", action="config")
parser.add_argument("--model", type=dict[str, Any], default={})
found = {}
print(f"jsonargparse {version('jsonargparse')}")
for override in ("--model.layers=4", "--model.rope.base=500000.0"):
    found[override] = parser.parse_args(["--config", "recipe.yaml", override]).model
    print(f"{override}: {found[override]}")
rope = {"base": 10000.0, "factor": 8.0}
assert found["--model.layers=4"] == {"rope": rope, "layers": 4}, "one level deep has changed"
expected = {"rope": {"base": "500000.0"}, "layers": 2}
assert found["--model.rope.base=500000.0"] == expected, "the behaviour has changed"
PYTHON
