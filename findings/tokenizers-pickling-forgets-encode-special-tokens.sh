#!/usr/bin/env bash
# tokenizers 0.23.3, seen 2026-11-30.
#
# `Tokenizer.encode_special_tokens = True` makes the text of a special token ordinary text: "<end>" in
# a document becomes the pieces of that word, not the token that ends documents. A tokenizer that was
# pickled, or copied by `copy.deepcopy`, has forgotten it: the attribute is False again, and the same
# text becomes the special token. We expected a copy to encode as its original does.
#
# Why it matters: worker processes get a tokenizer by pickling. What one process writes is then not
# what its workers write: in theirs the text of a document can end it. Set the attribute in each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
import copy
import pickle
from importlib.metadata import version

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

words = {"[UNK]": 0, "<": 1, "end": 2, ">": 3}
tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
tokenizer.pre_tokenizer = Whitespace()
tokenizer.add_special_tokens(["<end>"])
tokenizer.encode_special_tokens = True
copies = {
    "itself": tokenizer,
    "pickled": pickle.loads(pickle.dumps(tokenizer)),
    "deepcopied": copy.deepcopy(tokenizer),
}
print(f"tokenizers {version('tokenizers')}")
found = {}
for name, one in copies.items():
    found[name] = (one.encode_special_tokens, one.encode("<end>").tokens)
    print(f"{name}: encode_special_tokens={found[name][0]}, '<end>' becomes {found[name][1]}")
assert found["itself"] == (True, ["<", "end", ">"]), "the original has changed"
assert found["pickled"] == found["deepcopied"] == (False, ["<end>"]), "the behaviour has changed"
PYTHON
