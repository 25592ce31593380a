"""Values are read as people write them, and refused by name if they are of another kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dhellam import DHellamStrategy, LanguageModel
from lightning_dhellam.callbacks import AutoSearch, ThroughputMonitor
from lightning_dhellam.data import IndexedDataModule
from lightning_dhellam.data.config import PrepareConfig
from lightning_dhellam.models import ModelConfig, preset
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.values import conforms, kind, load_yaml, memory_bytes, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("370e9", 370e9),
        ("1e-5", 1e-5),
        ("1E+3", 1e3),
        (".5e3", 500.0),
        ("1.5e3", 1500.0),
        ("-2e2", -200.0),
        ("12", 12),
        ("1.5", 1.5),
        ("e9", "e9"),
        ("1e", "1e"),
        ("h200-node", "h200-node"),
        ("'370e9'", "370e9"),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: Any) -> None:
    found = read_yaml(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "line 2 gives 'c' a second time: leave one of them out"),
        ("a: [1\n", "not YAML: while parsing a flow sequence"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_in_a_line(
    text: str, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence) as error:
        load_yaml(file)
    assert "\n" not in str(error.value)


def test_merged_keys_may_be_overridden() -> None:
    assert read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}")["d"] == {"b": 3, "c": 2}


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        ("1", float, False),
        (None, float, False),
        (None, float | None, True),
        ("no", bool, False),
        ([0.9, 0.95], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ("ab", list[str], False),
        ([1, "2"], list[int], False),
        ({"a": 1}, dict[str, str], False),
        (Path("x"), str | Path, True),
        (torch.tensor(1), int, False),
    ],
)
def test_a_value_is_of_a_kind_or_not(value: Any, hint: Any, right: bool) -> None:
    assert conforms(value, hint) is right


_WRONG: dict[str, list[Any]] = {
    "a whole number": [None, "8", 1.5, True, [8]],
    "a number": [None, "1e-5", True, [1.0]],
    "true or false": [None, "no", 1],
    "text": [None, 3, ["x"]],
    "a whole number or a list, of a whole number each": [None, "8", 1.5, True, [1.5]],
    "a list, of a number each": [None, 1.0, "1e-5", ["1e-5"]],
    "a list, of a whole number each": [3, "8", [1.5], [True]],
}


def _field_cases() -> list[Any]:
    return [
        pytest.param(field.name, value, id=f"{field.name}={value!r}")
        for field in fields(ModelConfig)
        for words in [kind(eval(str(field.type)))]
        for value in _WRONG[words]
        if not (value is None and "None" in str(field.type))
    ]


@pytest.mark.parametrize(("name", "value"), _field_cases())
def test_every_field_of_a_model_is_of_its_kind(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}( is blank: give it|=.* must be) "):
        preset("llama-tiny", **{name: value})


_MAKERS: dict[str, Callable[..., Any]] = {
    "LanguageModel": LanguageModel,
    "DHellamStrategy": DHellamStrategy,
    "IndexedDataModule": lambda **given: IndexedDataModule(
        **{"path": "nowhere", "sequence_length": 8, "batch_size": 1, **given}
    ),
    "ThroughputMonitor": ThroughputMonitor,
    "AutoSearch": AutoSearch,
    "PrepareConfig": lambda **given: PrepareConfig(**{"source": ["a"], "output": "b", **given}),
    "Link": lambda **given: Link(**{"bandwidth": 1.0, **given}),
    "Cluster": lambda **given: Cluster(**{"world_size": 1, "links": {}, **given}),
}


@pytest.mark.parametrize(
    ("maker", "given", "sentence"),
    [
        ("LanguageModel", {"learning_rate": "1e-5"}, "learning_rate='1e-5' must be a number"),
        ("LanguageModel", {"weight_decay": None}, "weight_decay is blank: give it a number, or"),
        ("LanguageModel", {"betas": [0.9]}, r"betas=\[0.9\] must be a list of 2: a number, a num"),
        ("LanguageModel", {"warmup_steps": 1.5}, "warmup_steps=1.5 must be a whole number"),
        ("LanguageModel", {"betas": None}, "betas is blank: give it"),
        ("LanguageModel", {"overrides": [1]}, r"overrides=\[1\] must be a mapping from text to a"),
        ("LanguageModel", {"overrides": {"rotary_base": None}}, "rotary_base is blank: give it a"),
        ("LanguageModel", {"overrides": {"tie_embeddings": "no"}}, "tie_embeddings='no' must be "),
        ("DHellamStrategy", {"recompute": 1}, "recompute=1 must be text or a list, of text each"),
        ("DHellamStrategy", {"distributed_optimizer": "yes"}, "distributed_optimizer='yes' must"),
        ("DHellamStrategy", {"pipeline_split": 4}, "pipeline_split=4 must be a list, of a whole"),
        ("DHellamStrategy", {"seed": "1"}, "seed='1' must be a whole number"),
        ("DHellamStrategy", {"kernels": {"attention": 1}}, "attention"),
        ("DHellamStrategy", {"emulate": 8}, "emulate=8 must be text or of type Cluster"),
        ("IndexedDataModule", {"sequence_length": None}, "sequence_length is blank: give it a w"),
        ("IndexedDataModule", {"batch_size": "4"}, "batch_size='4' must be a whole number"),
        ("IndexedDataModule", {"seed": None}, "seed is blank: give it a whole number"),
        ("IndexedDataModule", {"num_workers": None}, "num_workers is blank: give it a whole numb"),
        ("IndexedDataModule", {"split": 98}, "split=98 must be text"),
        ("IndexedDataModule", {"path": None}, "path is blank: give it a mapping from text"),
        ("ThroughputMonitor", {"window": None}, "window is blank: give it a whole number"),
        ("ThroughputMonitor", {"peak_tflops": "989"}, "peak_tflops='989' must be a number"),
        ("AutoSearch", {"rounds": "5"}, "rounds='5' must be a whole number"),
        ("AutoSearch", {"replay": "no"}, "replay='no' must be true or false"),
        ("PrepareConfig", {"workers": None}, "workers is blank: give it a whole number"),
        ("Link", {"bandwidth": "370e9"}, "bandwidth='370e9' must be a number"),
        ("Cluster", {"world_size": 8.5}, "world_size=8.5 must be a whole number"),
    ],
)
def test_arguments_are_refused_by_name(maker: str, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _MAKERS[maker](**given)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (40, 40 << 30),
        (0.5, 1 << 29),
        ("40GiB", 40 << 30),
        (" 1.5 gib ", 3 << 29),
        ("512MiB", 512 << 20),
        ("80GB", 80 * 10**9),
        ("1TiB", 1 << 40),
        ("40", 40 << 30),
    ],
)
def test_amounts_of_memory(value: float | str, size: int) -> None:
    assert memory_bytes("memory_limit", value) == size


@pytest.mark.parametrize("value", [0, -1, "", "GiB", "40 Gib/s", "4e1", True, float("nan"), "0GiB"])
def test_what_is_no_amount_of_memory(value: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_limit=.* must be an amount of memory above 0"):
        memory_bytes("memory_limit", value)
