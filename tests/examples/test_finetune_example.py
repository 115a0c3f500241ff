"""The fine-tuning example runs as it stands, and accelerate understands the configurations beside it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"]


def test_finetune(checkpoint, clip, tmp_path, monkeypatch, capsys):
    turns = [{"from": "human", "value": "<video>What is it?"}, {"from": "gpt", "value": "A square."}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns, "video": "clip.mp4"}]))
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    overrides = f"--model_name_or_path {checkpoint} --dtype float32 --datasets data.json --fps 4 --packing no"
    overrides += " --multi_axis_checkpointing no --global_batch_size 1 --max_steps 2 --output_dir out --use_cpu"
    overrides += " --bf16 no --dataloader_num_workers 0"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "vamba_stage1", *overrides.split()])
    runpy.run_path(str(EXAMPLES / "finetune.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == "the trained model is in out/final"
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_every_configuration_is_tested():
    assert sorted(path.stem for path in (EXAMPLES / "accelerate").glob("*.yaml")) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_configuration(name, model):
    modules = {type(module).__name__ for module in model.modules()}
    path = EXAMPLES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses keys it does not know
    assert config.mixed_precision == "bf16" and config.num_processes == 8
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "examples/finetune.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    kind = {"ddp": "multi_gpu", "fsdp2": "use_fsdp"}.get(name, "use_deepspeed")
    assert getattr(arguments, kind) is True
    if name == "fsdp2":
        classes = arguments.fsdp_transformer_layer_cls_to_wrap.split(",")
        assert int(arguments.fsdp_version) == 2
        assert modules >= set(classes)
    if name == "deepspeed_zero3":
        assert arguments.zero_stage == 3
