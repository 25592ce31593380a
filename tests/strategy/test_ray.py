"""Ray Train's workers, each of which makes a Trainer with the strategy. Needs the extra `ray`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_dhellam.models import ModelConfig
from tests.strategy.runs import Losses, Model, loader, make_trainer

ray = pytest.importorskip("ray")

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {"tensor_parallel_size": 2}
STEPS = 3


def _on_worker(config: dict[str, Any]) -> None:
    """What a user writes: a Trainer as ever, with Ray's environment."""
    import torch
    from ray.train.lightning import RayLightningEnvironment, prepare_trainer

    torch.set_num_threads(1)
    folder, losses = Path(config["folder"]), Losses()
    trainer = prepare_trainer(
        make_trainer(
            SIZES,
            [losses],
            devices="auto",
            plugins=[RayLightningEnvironment()],
            max_steps=STEPS,
            default_root_dir=folder,
        )
    )
    module = Model(num_layers=1)
    trainer.fit(module, loader(SIZES))
    trainer.save_checkpoint(folder / "ray.ckpt")
    found = [trainer.world_size, trainer.strategy.context.topology.tp_rank, losses.values]
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def test_a_torch_trainer_runs_the_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    told = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": told},
    )
    try:
        TorchTrainer(
            _on_worker,
            train_loop_config={"folder": str(tmp_path)},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(storage_path=str(tmp_path / "ray"), name="test"),
        ).fit()
    finally:
        ray.shutdown()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [each[:2] for each in found] == [[2, 0], [2, 1]]
    assert found[0][2] == found[1][2]
    assert "WORLD_SIZE" not in os.environ
    losses = Losses()
    trainer = make_trainer({}, [losses], max_steps=STEPS)
    trainer.fit(Model(num_layers=1), loader({}))
    assert found[0][2] == pytest.approx(losses.values, rel=2e-5)
    # What the workers have saved loads here.
    whole = Model.load_from_checkpoint(tmp_path / "ray.ckpt", num_layers=1)
    assert isinstance(whole.model_config, ModelConfig)
    for name, value in trainer.lightning_module.state_dict().items():
        if value is not None:
            assert whole.state_dict()[name] == pytest.approx(value, rel=1e-3, abs=1e-4)
