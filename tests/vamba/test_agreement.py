"""Two processes on one CPU train as one does: DDP through `vamba finetune`, FSDP2 on the model itself.

accelerate runs FSDP on accelerators only, so here PyTorch's `fully_shard` is applied by hand as accelerate would.
"""

import json
from pathlib import Path

import pytest
import yaml

from vamba.training import finetune

from training_data import free_port, recipe_values, run_together, start, write_dataset


TWO = """
import json, sys
import torch, torch.distributed as dist
from vamba.cli import main
recipe, tests = sys.argv[1:]
assert main(["finetune", recipe]) == 0

sys.path.append(tests)
from tiny_vamba import media, prompt, tiny_model
from torch.distributed.fsdp import fully_shard
import vamba.modeling.video_model as chunked_loss
chunked_loss.LOGITS_AT_ONCE = 3 * 96  # three targets at once
mesh, rank = dist.device_mesh.init_device_mesh("cpu", (2,)), dist.get_rank()

def batch(lengths, grids, packed):
    # what each sample says, and the (t, h, w) of its video or None
    ids = torch.cat([prompt(n, items=int(grid is not None), seed=n) for n, grid in zip(lengths, grids)], 1)
    pixels, grid = media(*(grid for grid in grids if grid))
    lengths = [n + 2 * (grid is not None) for n, grid in zip(lengths, grids)]
    labels = ids.clone()
    labels[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
    packs = {"packed_lengths": lengths} if packed else {}
    return {"input_ids": ids, "labels": labels, "pixel_values_videos": pixels, "video_grid_thw": grid, **packs}

PLAIN = [batch([9], [(5, 4, 4)], False), batch([4], [(2, 4, 4)], False)]
PACKS = [batch([9, 5, 6], [(5, 4, 4), (2, 4, 4), (3, 4, 4)], True), batch([4, 7], [None, (40, 4, 4)], True)]

def gradients(model, batch):
    model.zero_grad()
    model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=10).loss.backward()
    return [p.grad for p in model.parameters()]

def sharded(cells, split_head):
    model = tiny_model().train()
    for module in model.modules():
        if type(module).__name__ in ("VambaDecoderLayer", "VambaVideoLevel") or split_head and module is model.lm_head:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if cells:
        model.gradient_checkpointing_enable()
        model.enable_multi_axis_checkpointing(2, 64)
    return model

worst = {}
for name, batches, cells, split_head in (
    ("plain", PLAIN, False, False), ("packs", PACKS, False, True), ("packs in cells", PACKS, True, True)
):
    model = tiny_model().train()
    both = [[None if g is None else g.clone() for g in gradients(model, batch)] for batch in batches]
    assert max(float(g.abs().max()) for g in both[1] if g is not None) > 0.1
    found = gradients(sharded(cells, split_head), batches[rank])
    worst[name] = max(
        float((gradient.full_tensor() - sum(g for g in expected if g is not None) / 2).abs().max())
        for gradient, *expected in zip(found, *both)
    )
if rank == 0:
    print(json.dumps(worst))
"""


@pytest.fixture(scope="module")
def two(checkpoint, tmp_path_factory):
    """Two processes after a DDP run and a sharded backward pass: the recipe's values, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    data = write_dataset(folder / "data", 8)
    values = recipe_values(checkpoint, data, folder / "two", max_steps=3, save_strategy="steps", save_steps=3)
    values |= {"global_batch_size": 8}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    return values, *run_together(TWO, [str(folder / "r.yaml"), str(Path(__file__).resolve().parents[1])], folder)


def test_two_processes_train_as_one(two):
    """Two processes with a batch each see in a step what one process sees with two workers and two batches."""
    values, first, second = two
    assert "trained 3 steps" in first and second == ""
    output = Path(values["output_dir"])
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
    alone = values | {"output_dir": f"{output}-alone", "dataloader_num_workers": 2, "save_strategy": "no"}
    assert losses == pytest.approx(finetune(values | alone).losses, rel=1e-4)
    places = {path.name for path in (output / "checkpoint-3").glob("data_*")}
    assert places == {"data_position_0.json", "data_position_1.json"}


def test_sharded_gradients_are_those_of_one_process(two):
    """Also where the processes differ in their number of samples with a video, of chunks of the loss, and of cells."""
    worst = json.loads(two[1].splitlines()[-1])
    assert worst.keys() == {"plain", "packs", "packs in cells"} and max(worst.values()) < 1e-5, worst


DIFFERENT = """
import sys, time
from vamba.cli import main
from datetime import timedelta
from unittest.mock import patch
import torch
from vamba.training import saving
from vamba.training.model import load_teacher
missing, fewer, teacher = sys.argv[1:]
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=10))
assert main(["finetune", missing]) == 2
with patch.dict("os.environ", ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
    whole = load_teacher(teacher, "float32")
    print("teacher", float(sum(weight.double().abs().sum() for weight in whole.parameters())))
finish = saving._finish
def slow(*args):
    time.sleep(12)  # as merging the adapters of a large model
    finish(*args)
saving._finish = slow
assert main(["finetune", fewer]) == 0
"""


def test_processes_that_see_different_files(checkpoint, tmp_path):
    """An error of one ends both, the steps of the first are those of both, nobody waits while it saves, and each has
    the whole teacher although FSDP loads the student on the first only."""
    data = write_dataset(tmp_path / "data", 8)
    (tmp_path / "fewer.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:4]))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = []
    for rank in range(2):
        recipes = []
        for name in ("missing", "fewer"):
            values = recipe_values(checkpoint, data, tmp_path / name, max_steps=-1, num_train_epochs=2)
            values["per_device_train_batch_size"] = 2
            source = {"path": str(tmp_path / f"{name}.jsonl"), "media_root": str(tmp_path / "data")}
            values["datasets"] = [source] if rank else values["datasets"]
            recipes.append(tmp_path / f"{name}{rank}.yaml")
            recipes[-1].write_text(yaml.safe_dump(values))
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = [str(path) for path in (*recipes, checkpoint.parent / "qwen")]
        running.append(start(DIFFERENT, arguments, tmp_path / f"rank{rank}", **environment))
    for process in running:
        process.join(60)
        process.kill()
    printed = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert all(process.exitcode == 0 for process in running), printed
    assert all("missing.jsonl: there is no such file" in printed[f"rank{rank}.err"] for rank in range(2))
    assert "trained 4 steps" in printed["rank0.out"] and (tmp_path / "fewer" / "final" / "config.json").is_file()
    teachers = [printed[f"rank{rank}.out"].splitlines()[0] for rank in range(2)]
    assert teachers[0] == teachers[1] and teachers[0].startswith("teacher")
