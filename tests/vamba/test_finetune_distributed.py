"""Two processes on one CPU train as one does: DDP through `vamba finetune`, FSDP2 on the model itself.

accelerate runs FSDP on accelerators only, so here PyTorch's `fully_shard` is applied by hand as accelerate would.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vamba.training import parse_recipe
from vamba.training.finetune import finetune

from training_data import recipe_values, write_dataset


TWO = """
import sys
import torch, torch.distributed as dist
from vamba.cli import main
from vamba.training.trainer import gather_for_video
recipe, tests = sys.argv[1:]
assert main(["finetune", recipe]) == 0

sys.path.append(tests)
from tiny_vamba import media, prompt, tiny_model
from torch.distributed.fsdp import fully_shard
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))

def gradients(model):
    pixels, grid = media((2, 4, 4), (3, 4, 4))
    ids = prompt(9, items=2)
    model(input_ids=ids, labels=ids, pixel_values_videos=pixels, video_grid_thw=grid, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}

expected = gradients(tiny_model().train())
model = tiny_model().train()
for module in model.modules():
    if type(module).__name__ in ("VambaDecoderLayer", "Mamba2Block"):
        fully_shard(module, mesh=mesh)
fully_shard(model, mesh=mesh)
gather_for_video(model)
found = gradients(model)
worst = max((gradient.full_tensor() - expected[name]).abs().max() for name, gradient in found.items())
if dist.get_rank() == 0:
    print("sharded gradients differ by", float(worst))
"""


@pytest.fixture(scope="module")
def two(checkpoint, tmp_path_factory):
    """Two processes after a DDP run and a sharded backward pass: the recipe's values, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    data = write_dataset(folder / "data", 8)
    values = recipe_values(checkpoint, data, folder / "two", max_steps=3, save_strategy="steps", save_steps=3)
    values |= {"global_batch_size": 8}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", TWO, str(folder / "r.yaml"), str(Path(__file__).resolve().parents[1])]
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=200) for process in running]
    assert all(process.returncode == 0 for process in running), printed[0][1][-2000:] + printed[1][1][-2000:]
    return values, printed[0][0], printed[1][0]


def test_two_processes_train_as_one(two):
    """Two processes with a batch each see in a step what one process sees with two workers and two batches."""
    values, first, second = two
    assert "trained 3 steps" in first and second == ""
    output = Path(values["train"]["output_dir"])
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    alone = values["train"] | {"output_dir": f"{output}-alone", "dataloader_num_workers": 2, "save_strategy": "no"}
    assert losses == pytest.approx(finetune(parse_recipe(values | {"train": alone})).losses, rel=1e-4)
    places = {path.name for path in (output / "checkpoint-3").glob("data_*")}
    assert places == {"data_position_0.json", "data_position_1.json"}


def test_sharded_gradients_are_those_of_one_process(two):
    assert float(two[1].split()[-1]) < 1e-5
