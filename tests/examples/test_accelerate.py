"""The configurations for accelerate: DeepSpeed's by two processes on the CPU, if it is installed, all on two GPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vamba.training import finetune


ROOT = Path(__file__).resolve().parents[2]

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def recipe(checkpoint, tmp_path_factory):
    """A recipe of three steps, and the losses of one process with it, whose two workers read what two processes do."""
    sys.path.append(str(ROOT / "tests" / "vamba"))
    from training_data import recipe_values, write_dataset

    folder = tmp_path_factory.mktemp("accelerate")
    values = recipe_values(checkpoint, write_dataset(folder / "data", 8), folder / "out", max_steps=3)
    values |= {"global_batch_size": 8}
    alone = values | {"dataloader_num_workers": 2, "save_strategy": "no"}
    return values, finetune(values | alone).losses


def train_with_two(configuration: str, values: dict, folder: Path, on_cpu: bool) -> list[float]:
    """Losses of the recipe run by two processes, which save at the end."""
    output = {"output_dir": str(folder / "out"), "save_strategy": "steps", "save_steps": 3, "use_cpu": on_cpu}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | output))
    config = yaml.safe_load((ROOT / f"examples/accelerate/{configuration}.yaml").read_text())
    config |= {"num_processes": 2, "mixed_precision": "no"} | ({"use_cpu": True} if on_cpu else {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    command += [str(ROOT / "examples/finetune.py"), str(folder / "recipe.yaml")]
    environment = os.environ | ({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if on_cpu else {})
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]
    assert (folder / "out/final/README.md").is_file() and (folder / "out/final/model.safetensors").is_file()
    state = json.loads((folder / "out/checkpoint-3/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("in_cells", [False, True])
def test_two_processes_train_as_one(recipe, stage, in_cells, tmp_path):
    values, losses = recipe
    values = values | {"multi_axis_checkpointing": in_cells}
    logged = train_with_two(f"deepspeed_zero{stage}", values, tmp_path, on_cpu=True)
    assert logged == pytest.approx(list(losses.values()), rel=1e-4)


@pytest.mark.gpu
@needs_gpus
@pytest.mark.parametrize(
    "configuration",
    [
        "ddp",
        "fsdp2",
        pytest.param("deepspeed_zero2", marks=needs_deepspeed),
        pytest.param("deepspeed_zero3", marks=needs_deepspeed),
    ],
)
@pytest.mark.parametrize("in_cells", [False, True])
def test_two_gpus_train_as_one_process(recipe, configuration, in_cells, tmp_path):
    values, losses = recipe
    values = values | {"multi_axis_checkpointing": in_cells, "multi_axis_offload": in_cells}
    logged = train_with_two(configuration, values, tmp_path, on_cpu=False)
    assert logged == pytest.approx(list(losses.values()), rel=1e-3)
