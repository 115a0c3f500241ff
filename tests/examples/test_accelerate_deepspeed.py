"""The configurations for DeepSpeed, each run by two processes on the CPU, where DeepSpeed is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vamba.training import parse_recipe
from vamba.training.finetune import finetune


ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture(scope="module")
def recipe(checkpoint, tmp_path_factory):
    """A recipe of three steps, and the losses of one process with it, whose two workers read what two processes do."""
    sys.path.append(str(ROOT / "tests" / "vamba"))
    from training_data import recipe_values, write_dataset

    folder = tmp_path_factory.mktemp("deepspeed")
    values = recipe_values(checkpoint, write_dataset(folder / "data", 8), folder / "out", max_steps=3)
    values |= {"global_batch_size": 8}
    alone = values["train"] | {"dataloader_num_workers": 2, "save_strategy": "no"}
    return values, finetune(parse_recipe(values | {"train": alone})).losses


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("checkpointing", ["none", "multi_axis"])
def test_two_processes_train_as_one(recipe, stage, checkpointing, tmp_path):
    values, losses = recipe
    output = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 3}
    values = values | {"checkpointing": checkpointing, "train": values["train"] | output}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    config = yaml.safe_load((ROOT / f"examples/accelerate/deepspeed_zero{stage}.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no", "use_cpu": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "config.yaml")]
    command += [str(ROOT / "examples/finetune.py"), str(tmp_path / "recipe.yaml")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]
    assert (tmp_path / "out/final/README.md").is_file() and (tmp_path / "out/final/model.safetensors").is_file()
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    logged = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    assert logged == pytest.approx(losses, rel=1e-4)
