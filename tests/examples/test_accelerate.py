"""The configurations for accelerate: DeepSpeed's by two processes on the CPU, if it is installed, all on two GPUs.

The greatest of the evaluations' losses is asked for, so the result is not the last model.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from vamba.training import finetune, load_recipe, prepare


ROOT = Path(__file__).resolve().parents[2]

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def recipe(checkpoint, tmp_path_factory):
    """A recipe of three steps, and what one process logs with it, whose two workers read what two processes do."""
    sys.path.append(str(ROOT / "tests" / "vamba"))
    from training_data import recipe_values, write_dataset, write_rows

    folder = tmp_path_factory.mktemp("accelerate")
    data, held_out = write_dataset(folder / "data", 8), write_dataset(folder / "held-out", 3, seed=1)
    question = {"question": "Which?", "options": ["red", "green"], "answer": "A"}
    rows = [question | {"video": str(held_out.parent / f"{number}.mp4")} for number in range(3)]
    values = recipe_values(checkpoint, data, folder / "out", max_steps=3)
    values |= {"global_batch_size": 8, "load_best_model_at_end": True, "greater_is_better": True}
    values |= {"eval_datasets": [str(held_out)], "eval_questions": str(write_rows(folder / "q.jsonl", rows))}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    finetune(values | {"dataloader_num_workers": 2})
    return values, logged(folder / "out")


def logged(output: Path) -> list[float]:
    """What a run has measured, step by step; its result is checked to be the best model."""
    state = json.loads((output / "final" / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_model_checkpoint"] == "checkpoint-1" and losses[0] > max(losses[1:])
    names = ("loss", "eval_loss", "eval_accuracy", "eval_failed_questions")
    return [entry[name] for entry in state["log_history"] for name in names if name in entry]


def train_with_two(configuration: str, values: dict, folder: Path, on_cpu: bool) -> list[float]:
    """What two processes log with the recipe."""
    output = {"output_dir": str(folder / "out"), "use_cpu": on_cpu}
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
    prepared = prepare(load_recipe(values | {"output_dir": str(folder / "other"), "use_cpu": True}))
    model = AutoModelForImageTextToText.from_pretrained(folder / "out" / "final", dtype=torch.float32).eval()
    found = prepared.evaluation.measure(model, prepared.processor, lambda stream: stream.loader())
    measured = logged(folder / "out")
    assert found["loss"] == pytest.approx(measured[1], rel=1e-4)  # the weights are those of the best checkpoint
    return measured


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("in_cells", [False, True])
def test_two_processes_train_as_one(recipe, stage, in_cells, tmp_path):
    values, expected = recipe
    values = values | {"multi_axis_checkpointing": in_cells}
    assert train_with_two(f"deepspeed_zero{stage}", values, tmp_path, on_cpu=True) == pytest.approx(expected, rel=1e-4)


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
    values, expected = recipe
    values = values | {"multi_axis_checkpointing": in_cells, "multi_axis_offload": in_cells}
    assert train_with_two(configuration, values, tmp_path, on_cpu=False) == pytest.approx(expected, rel=1e-3)
