"""A checkpoint knows which model it is of: another one is refused, or restored."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam.checkpoint import described
from lightning_dhellam.checkpoint.folder import load_common
from lightning_dhellam.checkpoint.model import check_model
from lightning_dhellam.commands.fit import run_lightning
from lightning_dhellam.models import PRESETS, preset
from tests.strategy.runs import (
    OF_TEXT,
    SHAPE,
    Losses,
    Model,
    evaluation,
    loader,
    make_trainer,
    words_of_a_run,
)

TRAINED: dict[str, Any] = {"rotary_base": 10_000.0, "norm_epsilon": 1e-4, "hidden_dropout": 0.1}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    keep = ModelCheckpoint(folder, filename="a", every_n_train_steps=1)
    trainer = make_trainer({}, [keep], max_steps=1, enable_checkpointing=True)
    trainer.fit(Model(**TRAINED), loader({}, samples=8))
    return folder / "a.ckpt"


def _validate(path: Path, strategy: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """What is said when a checkpoint is validated."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = make_trainer(strategy or {})
        model = Model(**changes)
        trainer.validate(model, evaluation({}, samples=8), ckpt_path=path, verbose=False)
    lines = [str(warning.message) for warning in said]
    return [line for line in lines if not line.startswith("Be aware that when using `ckpt_path`")]


@pytest.mark.parametrize(
    ("changes", "saved", "given", "remedy"),
    [
        ({"rotary_base": 5e5}, "rotary_base=10000.0", "rotary_base=500000.0", "resume_settings="),
        ({"norm_epsilon": 1e-5}, "norm_epsilon=0.0001", "norm_epsilon=1e-05", "resume_settings="),
        (
            {"rope_scaling_factor": 8.0},
            "rope_scaling_factor=None",
            "rope_scaling_factor=8.0",
            "resume_settings=",
        ),
        ({"tie_embeddings": True}, "tie_embeddings=False", "tie_embeddings=True", "overrides"),
        (
            {"num_layers": 3, "norm_epsilon": 1e-5},
            "num_layers=2, norm_epsilon=0.0001",
            "num_layers=3, norm_epsilon=1e-05",
            "overrides",
        ),
    ],
)
def test_another_model_is_refused_by_field_with_both_values(
    kept: Path, changes: dict[str, Any], saved: str, given: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match="give the model the same") as caught:
        _validate(kept, **{**TRAINED, **changes})
    message = str(caught.value)
    assert f"holds a model with {saved}, this run has {given}" in message
    assert remedy in message and "\n" not in message


def test_what_weights_do_not_depend_on_may_differ(kept: Path) -> None:
    same = {**TRAINED, "hidden_dropout": 0.0, "max_sequence_length": 32, "init_std": 0.1}
    assert not [line for line in _validate(kept, head_dim=4, **same) if "checkpoint" in line]
    with pytest.raises(
        ValueError, match=r"with hidden_dropout=0\.1, this run has hidden_dropout=0\.0"
    ):
        make_trainer({}).fit(Model(**same), loader({}, samples=8), ckpt_path=kept)


def test_a_table_of_positions_has_as_many_rows_as_the_longest_sequence(
    kept: Path, tmp_path: Path
) -> None:
    learned = replace(SHAPE, position_embedding="learned", hidden_dropout=0.1)
    path = _with_model(kept, tmp_path, lambda model: described(learned))
    same = replace(learned, embedding_dropout=0.1)
    assert check_model(path, same, training=True, resume_settings="checkpoint") == []
    shorter = replace(learned, max_sequence_length=8)
    for settings in ("checkpoint", "arguments"):
        with pytest.raises(ValueError, match=r"this run has max_sequence_length=8: give"):
            check_model(path, shorter, training=False, resume_settings=settings)


def test_losses_that_balance_experts_matter_to_training_only(kept: Path, tmp_path: Path) -> None:
    mixture = replace(SHAPE, num_experts=4, aux_loss_coefficient=0.01)
    path = _with_model(kept, tmp_path, lambda model: described(mixture))
    other = replace(mixture, aux_loss_coefficient=0.0, z_loss_coefficient=1e-3)
    assert check_model(path, other, training=False, resume_settings="checkpoint") == []
    with pytest.raises(ValueError, match=r"aux_loss_coefficient=0\.01.*aux_loss_coefficient=0\.0"):
        check_model(path, other, training=True, resume_settings="checkpoint")
    assert len(check_model(path, other, training=True, resume_settings="arguments")) == 2
    with pytest.raises(ValueError, match="num_experts=4"):
        check_model(path, SHAPE, training=False, resume_settings="arguments")


@pytest.mark.parametrize(
    ("name", "saved", "given", "training"),
    [
        ("aux_loss_coefficient", 0.1, 0.02, True),
        ("z_loss_coefficient", 0.0, 1e-3, True),
        ("router_bias_update_rate", 1e-3, 0.0, True),
        ("capacity_factor", None, 1.25, False),
        ("drop_policy", "probs", "position", False),
        ("router_scaling_factor", 2.5, 1.0, False),
        ("experts_per_token", 2, 3, False),
    ],
)
def test_how_experts_are_balanced_is_no_models_identity(
    kept: Path, tmp_path: Path, name: str, saved: Any, given: Any, training: bool
) -> None:
    """`training`: whether it matters to that alone."""
    mixture = replace(SHAPE, num_experts=4, router_scores="sigmoid", router_bias_update_rate=1e-3)
    path = _with_model(kept, tmp_path, lambda _: described(replace(mixture, **{name: saved})))
    own = replace(mixture, **{name: given})
    (line,) = check_model(path, own, training=True, resume_settings="arguments")
    assert line == f"{name}: {given}, as this run was given, not {saved}, as in the checkpoint"
    evaluated = check_model(path, own, training=False, resume_settings="arguments")
    assert evaluated == ([] if training else [line])
    for goes_on in (True, False) if not training else (True,):
        with pytest.raises(ValueError, match=r"let this run's win.*resume_settings='arguments'"):
            check_model(path, own, training=goes_on, resume_settings="checkpoint")


def test_a_model_without_biases_is_another_one(kept: Path, tmp_path: Path) -> None:
    mixture = replace(SHAPE, num_experts=4, router_scores="sigmoid", router_bias_update_rate=0.0)
    path = _with_model(kept, tmp_path, lambda _: described(mixture))
    without = replace(mixture, router_bias_update_rate=None)
    for training in (True, False):
        with pytest.raises(ValueError, match=r"=0\.0, this run has router_bias_update_rate=None"):
            check_model(path, without, training=training, resume_settings="arguments")


def test_this_runs_settings_win_where_no_shape_depends_on_them(kept: Path) -> None:
    arguments = {"resume_settings": "arguments"}
    given = {**TRAINED, "rotary_base": 5e5}
    line = "rotary_base: 500000.0, as this run was given, not 10000.0, as in the checkpoint"
    assert _validate(kept, arguments, **given).count(line) == 1
    with pytest.raises(ValueError, match="num_layers=2"):
        _validate(kept, arguments, **{**given, "num_layers": 1})
    losses = Losses()
    trainer = make_trainer(arguments, [losses], max_steps=2)
    trainer.fit(Model(**{**given, "hidden_dropout": 0.0}), loader({}), ckpt_path=kept)
    assert len(losses.values) == 1


def _with_model(kept: Path, folder: Path, model: Any) -> Path:
    path = shutil.copytree(kept, folder / "b.ckpt")
    topology = json.loads((path / "topology.json").read_text())
    del topology["checksum"]
    (path / "topology.json").write_text(json.dumps({**topology, "model": model(topology["model"])}))
    return path


def test_a_checkpoint_without_configuration_is_loaded_with_a_line(
    kept: Path, tmp_path: Path
) -> None:
    said = _validate(_with_model(kept, tmp_path, lambda model: None), rotary_base=5e5)
    (line,) = (line for line in said if "checkpoint" in line)
    assert "b.ckpt does not say which model it is of" in line


def test_a_field_that_is_newer_or_older_than_the_checkpoint(kept: Path, tmp_path: Path) -> None:
    older = _with_model(kept, tmp_path, lambda m: {k: m[k] for k in m if k != "qkv_bias"})
    assert not [line for line in _validate(older, **TRAINED) if "checkpoint" in line]
    with pytest.raises(ValueError, match="qkv_bias=False, this run has qkv_bias=True"):
        _validate(older, qkv_bias=True, **TRAINED)
    shutil.rmtree(older)
    newer = _with_model(kept, tmp_path, lambda m: {**m, "sinks": 4})
    with pytest.raises(ValueError, match="with sinks=4, which this version of lightning-dhellam"):
        _validate(newer, **TRAINED)


def test_the_command_restores_the_model_of_a_checkpoint(tmp_path: Path) -> None:
    words = [
        *words_of_a_run(tmp_path),
        "--data.split=8,1,1",
    ]
    overrides = {**OF_TEXT, "rotary_base": 10_000.0, "norm_epsilon": 1e-3}
    kept = tmp_path / "kept"
    saving = [
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=1",
        "--trainer.callbacks=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={kept}",
        "--trainer.callbacks.filename=a",
    ]
    fitted = run_lightning(["fit", *words, *saving, f"--model.overrides={overrides}"])
    assert load_common(kept / "a.ckpt")["global_step"] == 2
    assert load_common(kept / "last.ckpt")["global_step"] == 3
    resume = f"--ckpt_path={kept / 'a.ckpt'}"
    found = run_lightning(["validate", *words, "--trainer.limit_val_batches=1", resume])
    assert found.callback_metrics["val_loss"] == fitted.callback_metrics["val_loss"]
    models = [run.lightning_module.model_config for run in (found, fitted)]
    assert described(models[0]) == described(models[1])  # type: ignore[arg-type]
    run_lightning(["predict", *words, resume])
    predicted = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["prediction"]) == 16 for line in predicted) and predicted
    with pytest.raises(ValueError, match=r"with rotary_base=10000\.0, norm_epsilon=0\.001"):
        run_lightning(["validate", *words, resume, f"--model.overrides={OF_TEXT}"])


@pytest.mark.parametrize("name", PRESETS)
def test_a_description_comes_back_from_a_file_as_it_was(name: str) -> None:
    """Otherwise a checkpoint would be taken for one of another model."""
    found = described(preset(name))
    assert json.loads(json.dumps(found)) == found
    assert preset(name, **found) == replace(preset(name), head_dim=preset(name).kv_channels)
