"""What a run shows: sizes of the whole model, epochs that there are, lines in a file."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar

from lightning_dhellam.callbacks import EpochBar, ProgressLines, RankSummary
from lightning_dhellam.displays import displays, size_of, whole_parameters
from lightning_dhellam.models import CausalLM, parameter_count
from lightning_dhellam.parallel import ParallelContext
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Model, evaluation, loader, make_trainer

CPU = torch.device("cpu")
DEEP = replace(SHAPE, num_layers=4)
MIXED = replace(DEEP, num_experts=4, moe_layer_freq=2, shared_expert_ffn_hidden_size=16)


def _counts(rank: int) -> tuple[list[int], str, str]:
    found, said, mixed = [], "", ""
    for sizes in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        split = (1, 1, 1, 1) if "pipeline_parallel_size" in sizes else ()
        context = ParallelContext.create(CPU, pipeline_split=split, **sizes)
        model = CausalLM(DEEP, context)
        found.append(whole_parameters(model, context))
        said = size_of(model, DEEP, context, 16)
        context.destroy()
    for sizes in (
        {"expert_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_parallel_size": 2},
        {"tensor_parallel_size": 2},
    ):
        context = ParallelContext.create(CPU, **sizes)
        model = CausalLM(MIXED, context)
        found.append(whole_parameters(model, context))
        mixed = size_of(model, MIXED, context, 16)
        context.destroy()
    return found, said, mixed


def test_parameters_of_the_whole_model_are_counted_on_every_rank() -> None:
    (first, said, mixed), (second, said_second, _) = run_ranks(2, _counts)
    assert first == second == [parameter_count(DEEP)] * 2 + [parameter_count(MIXED)] * 3
    assert ", of which each token meets 15.1 K, " in mixed
    # The first stage has embedding and head as well.
    assert said.startswith("model: 10.4 K parameters in all (5.7 K of them on this rank), ")
    assert said_second.startswith("model: 10.4 K parameters in all (4.7 K of them on this rank), ")


def test_a_run_in_a_file_shows_lines_and_says_what_is_of_one_rank(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {
        "enable_progress_bar": True,
        "max_steps": 5,
        "log_every_n_steps": 2,
        "limit_val_batches": 1,
        "val_check_interval": 4,
    }
    trainer = make_trainer({}, [ProgressLines()], **options)
    with caplog.at_level(logging.INFO):
        trainer.fit(Model(), loader({}), evaluation({}))
    lines = capsys.readouterr().out.splitlines()
    shown = [line.partition(":")[0] for line in lines if "step" in line]
    assert shown == [
        "epoch 0, step 2 of 5",
        "epoch 0, step 4 of 5",
        "validated after step 4",
        "epoch 0, step 5 of 5",
    ]
    assert "train_loss " in lines[0] and "val_loss " in lines[2]
    assert max(map(len, lines)) < 120
    (size,) = [text for text in caplog.messages if text.startswith("model: ")]
    assert size.startswith("model: 5.7 K parameters in all, ")
    assert "33.8 kFLOP per token to train on sequences of 16 tokens" in size


def test_the_table_of_a_summary_says_that_it_is_of_one_rank(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [("Name", ["model"]), ("Params", ["2.1 M"]), ("Mode", ["train"]), ("FLOPs", ["0"])]
    with caplog.at_level(logging.INFO):
        RankSummary.summarize(rows, 2_100_000, 2_000_000, 8.4, {"train": 1, "eval": 0}, 0, ranks=2)
    text = caplog.text
    assert "Total params (rank 0 of 2)" in text and "flops" not in text.lower()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        RankSummary.summarize(rows, 2_100_000, 2_000_000, 8.4, {"train": 1, "eval": 0}, 0, ranks=1)
    assert re.search(r"Total params$", caplog.text, re.MULTILINE) and "of 1" not in caplog.text


@pytest.mark.parametrize(("last", "text"), [(-1, "Epoch 0"), (3, "Epoch 0/2"), (None, "Epoch 0")])
def test_epochs_without_a_limit_are_not_counted_to_minus_two(last: int | None, text: str) -> None:
    bar = EpochBar()
    bar._trainer = SimpleNamespace(max_epochs=last)  # type: ignore[assignment]
    assert bar._get_train_description(0).strip() == text


def test_displays_suit_the_output_and_leave_the_users_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kinds(**trainer: Any) -> list[type]:
        return [type(one) for one in displays(trainer)]

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert kinds() == [EpochBar, RankSummary]
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert kinds(callbacks=None) == [ProgressLines, RankSummary]
    assert kinds(enable_progress_bar=False) == [RankSummary]
    assert kinds(enable_model_summary=False, callbacks=TQDMProgressBar()) == []
    assert kinds(callbacks=[ModelSummary()]) == [ProgressLines]
    assert kinds(barebones=True) == []
