#!/usr/bin/env bash
# torch 2.13.0 on a CPU, seen 2026-11-30.
#
# From one seed, `torch.rand(n)` begins with the same numbers whatever n is. `torch.randn(n)`, and all
# that draws by it, does not: below 16 numbers it draws in another way than from 16 on, and unless n is
# a multiple of 16 the last 16 are drawn anew from what the generator gives next. So randn(8) is no
# beginning of randn(16), and randn(20) ends otherwise than randn(32) at the same places. We expected
# the beginning of a longer draw, as with `rand`.
#
# Why it matters: a rank that draws its own part of a weight, or a vocabulary that is padded to another
# number of rows, has other initial weights from the same seed; with sizes that are multiples of 16
# nobody notices. Draw the whole in its final size, and cut.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import torch


def alike(draw, few: int, many: int) -> int:
    """How many of `few` numbers are those that `many` begin with."""
    drawn = []
    for count in (few, many):
        torch.manual_seed(0)
        drawn.append(draw(count)[:few])
    return int((drawn[0] == drawn[1]).sum())


print("torch", torch.__version__)
cases = [(8, 15), (8, 16), (20, 32), (1000, 1008), (32, 48)]
found = {pair: (alike(torch.rand, *pair), alike(torch.randn, *pair)) for pair in cases}
for (few, many), (uniform, normal) in found.items():
    print(f"of {few} and {many}: {uniform} of {few} are alike by rand, {normal} by randn")
assert all(uniform == few for (few, _), (uniform, _) in found.items()), "rand has changed"
assert found[8, 15][1] == 8 and found[32, 48][1] == 32
changed = "the behaviour has changed"
assert found[8, 16][1] == 0 and found[20, 32][1] == 4 and found[1000, 1008][1] == 984, changed
PYTHON
