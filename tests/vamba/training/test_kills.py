"""`vamba finetune` and `vamba demo`, killed at any moment: old state stays, and the next run ends as if nothing was."""

import json
from itertools import islice
from pathlib import Path

import torch

from vamba import demo
from vamba.training import finetune

import kill_points


def train(values: dict, resume: bool = False) -> None:
    torch.set_num_threads(1)
    finetune(values, resume=resume)


def result(output) -> tuple:
    """Losses and weights of what was trained, and what is in the folder. What is evaluated is among the losses."""
    history = json.loads((output / "final" / "trainer_state.json").read_text())["log_history"]
    losses = [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]
    return losses, (output / "final" / "model.safetensors").read_bytes(), sorted(p.name for p in output.iterdir())


def test_a_killed_finetune_is_resumed_as_if_it_had_not_been(values, tmp_path):
    values |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    data = Path(values["datasets"][0])
    (tmp_path / "one.jsonl").write_text(data.read_text().splitlines()[0])
    held_out = [{"path": str(tmp_path / "one.jsonl"), "media_root": str(data.parent)}]
    values |= {"per_device_train_batch_size": 1, "eval_datasets": held_out}
    values |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": True}
    seconds, operations = kill_points.run_to_the_end(train, values)
    expected = result(tmp_path / "out")
    assert len(expected[0]) == 6 and expected[2] == ["checkpoint-1", "checkpoint-3", "curves.png", "final"]
    kills = [{"step": step} for step in islice(kill_points.steps(operations), 0, None, 2)]
    kills += [{"seconds": moment} for moment in islice(kill_points.moments(seconds), 1, None, 2)]
    for number, kill in enumerate(kills):
        output = tmp_path / f"{number}"
        killed = kill_points.kill_at(train, values | {"output_dir": str(output)}, **kill)
        assert killed or result(output) == expected
        kill_points.run_to_the_end(train, values | {"output_dir": str(output)}, True)
        assert result(output) == expected, kill


def run_demo(output) -> None:
    torch.set_num_threads(1)
    demo.run(output, steps=1, train_videos=2, test_videos=1, batch_size=1)


def test_a_killed_demo_leaves_the_earlier_one(tmp_path):
    output = tmp_path / "runs" / "demo"
    output.mkdir(parents=True)
    (output / "demo.json").write_text("{}")
    for moment in islice(kill_points.moments(7.0), 0, None, 2):
        if kill_points.kill_at(run_demo, output, seconds=moment):
            assert [path.name for path in output.iterdir()] == ["demo.json"] or (output / "config.json").exists()
    kill_points.run_to_the_end(run_demo, output)
    assert (output / "config.json").exists() and not (output / "work").exists()
    assert [path.name for path in output.parent.iterdir()] == ["demo"]
