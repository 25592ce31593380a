"""What differs between versions of torch and Megatron-core is in one module, and nothing warns."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.transformer.spec_utils import build_module

import lightning_dhellam
from lightning_dhellam.models import CausalLM
from lightning_dhellam.models.spec import llama_layer_spec
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import SMALL

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
ASKS = re.compile(r"torch\.__version__|megatron\.core\.__version__|package_info|_min_version")


def test_a_model_is_built_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        CausalLM(SMALL, ParallelContext.single(CPU))
    assert not caplog.records


def test_data_are_opened_without_a_warning(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"))
    builder.add_item(torch.arange(8))
    builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    code = (
        "import lightning_dhellam.data.indexed as indexed;"
        f"indexed.open_indexed({str(tmp_path / 'data')!r}, vocab_size=8)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "determine rank" not in done.stderr


def test_building_a_layer_leaves_its_specification_as_it_is() -> None:
    context = ParallelContext.single(CPU)
    config = SMALL.transformer_config(context)
    spec = llama_layer_spec(SMALL.ffn_hidden_size)
    mlp, before = spec.submodules.mlp, deepcopy(vars(spec.submodules))
    with context.megatron():
        layers = [
            build_module(spec, config=config, layer_number=number, pg_collection=context.groups)
            for number in (1, 2)
        ]
    assert spec.submodules.mlp is mlp
    assert vars(spec.submodules).keys() == before.keys()
    assert layers[1].mlp.linear_fc1.weight.shape == layers[0].mlp.linear_fc1.weight.shape


def test_one_module_asks_for_versions() -> None:
    package = Path(lightning_dhellam.__file__).parent
    folders = (package, ROOT / "kernels", ROOT / "search", ROOT / "recipes", ROOT / "benchmarks")
    asking = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in folder.rglob("*.py")
        if ASKS.search(path.read_text())
    }
    assert asking <= {"lightning_dhellam/versions.py"}
