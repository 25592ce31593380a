"""Batches of transformers' collators, as they come: its loss and gradients, fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
)

from lightning_dhellam.models import export_llama
from tests.models.llama import SMALL, hugging_face_llama, relative_error
from tests.ranks import run_ranks
from tests.runner.test_context_parallel import Case, gradients_of, started

CONFIG = replace(SMALL, num_layers=4)
LENGTHS = (5, 11, 4, 13)
LAYOUTS = {
    "tensor": {"tensor_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}
Outcome = tuple[Tensor, dict[str, Tensor], Tensor]
"""Loss, gradients, logits."""


def _tokenizer(side: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0} | {f"w{number}": number for number in range(1, CONFIG.vocab_size)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", padding_side=side, model_max_length=64
    )


def _samples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in LENGTHS:
        ids = torch.randint(1, CONFIG.vocab_size, (length,), generator=generator).tolist()
        # The prompt does not count.
        found.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return found


def _plain() -> list[dict[str, list[int]]]:
    return [{"input_ids": sample["input_ids"]} for sample in _samples()]


@cache
def _batches() -> dict[str, Mapping[str, Tensor]]:
    batches: dict[str, Any] = {}
    for side in ("right", "left"):
        options: dict[str, Any] = {"tokenizer": _tokenizer(side)}
        batches[f"language-model-{side}"] = DataCollatorForLanguageModeling(mlm=False, **options)(
            _plain()
        )
        batches[f"supervised-{side}"] = DataCollatorForSeq2Seq(**options)(_samples())
    batches["flattened"] = DataCollatorWithFlattening()(_samples())
    batches["flattened-kernels"] = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True
    )(_samples())
    padded = dict(batches["supervised-left"])
    mask = padded["attention_mask"]
    batches["supervised-left-positions"] = padded | {
        "position_ids": (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    }
    return batches


NAMES = tuple(_batches())


@cache
def _expected(name: str) -> Outcome:
    """By transformers, but for what padding says of the token after it: it has no value there."""
    reference, batch = hugging_face_llama(CONFIG), dict(_batches()[name])
    if "attention_mask" in batch:
        behind_padding = batch["attention_mask"].diff(dim=1, prepend=torch.zeros(4, 1)) > 0
        batch["labels"] = batch["labels"].masked_fill(behind_padding, -100)
    read = {"input_ids", "labels", "attention_mask", "position_ids"}
    # With its cache, which is the default, documents of one row would attend to each other.
    told = {key: value for key, value in batch.items() if key in read}
    found = reference(**told, use_cache=False)
    found.loss.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    return found.loss.detach(), gradients, found.logits.detach()


def _check(name: str, loss: Tensor, gradients: Mapping[str, Tensor], logits: Tensor) -> None:
    expected_loss, expected, expected_logits = _expected(name)
    seen = _batches()[name].get("attention_mask", torch.ones(logits.shape[:2])) == 1
    assert logits.shape == expected_logits.shape
    assert relative_error(logits[seen], expected_logits[seen]) <= 1e-5
    assert abs(loss - expected_loss) <= 1e-6 * expected_loss
    assert gradients.keys() == expected.keys()
    errors = {key: relative_error(gradients[key], expected[key]) for key in expected}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("name", NAMES)
def test_one_process_trains_what_transformers_does(name: str) -> None:
    with started(Case({}, config=CONFIG)) as runner:
        loss = runner.train(_batches()[name])
        gradients = export_llama(runner.model, gradients_of(runner))
        _check(name, loss, gradients, runner.predict(_batches()[name]))
        assert abs(runner.evaluate(_batches()[name]) - loss) <= 1e-6 * loss


def _outcome(name: str, sizes: dict[str, int]) -> Outcome:
    with started(Case(sizes, config=CONFIG)) as runner:
        loss, gradients = runner.train(_batches()[name]), gradients_of(runner)
        if runner.context.topology.pp_size == 1:
            gradients = export_llama(runner.model, gradients)
        return loss, gradients, runner.predict(_batches()[name])


def _outcomes(rank: int) -> dict[tuple[str, str], Outcome]:
    return {
        (layout, name): _outcome(name, sizes) for layout, sizes in LAYOUTS.items() for name in NAMES
    }


def test_every_layout_trains_what_transformers_does() -> None:
    first, second = run_ranks(2, _outcomes)
    for name in NAMES:
        for layout in ("tensor", "context"):
            for found in (first, second):
                _check(name, *found[layout, name])
        loss, gradients, _ = first["pipeline", name]
        gradients = {**second["pipeline", name][1], **gradients}
        assert abs(loss - _expected(name)[0]) <= 1e-6 * loss
        with started(Case({}, config=CONFIG)) as runner:
            runner.train(_batches()[name])
            alone = gradients_of(runner)
        assert gradients.keys() == alone.keys()
        errors = {key: relative_error(gradients[key], alone[key]) for key in alone}
        assert max(errors.values()) <= 1e-5, errors
