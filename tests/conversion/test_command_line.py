"""conversion/command_line.py, in process and as `python -m vamba.conversion`."""

import argparse
import functools
import subprocess
import sys

import pytest
from safetensors import safe_open

from vamba.cli import main as vamba
from vamba.conversion import checkpoint
from vamba.conversion.command_line import add_arguments, run


def main(arguments):
    return vamba(["convert", *arguments])


def test_converts_as_a_program(qwen2_vl, tmp_path):
    command = [sys.executable, "-m", "vamba.conversion", qwen2_vl, tmp_path / "ours", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "ours") and "converting" in done.stderr
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"


def test_every_argument_arrives(monkeypatch):
    seen = {}

    @functools.wraps(checkpoint.convert)
    def convert(**options):
        seen.update(options)

    monkeypatch.setattr(checkpoint, "convert", convert)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = "a b --dtype float16 --to original --seed 3 --max-shard-size 1MB --overwrite --no-progress"
    line += " --vision c --tokenizer d"
    args = parser.parse_args(line.split())
    args.debug = False  # as the command line adds it
    run(args)
    assert seen == {
        "source": "a",
        "destination": "b",
        "dtype": "float16",
        "to": "original",
        "seed": 3,
        "max_shard_size": "1MB",
        "overwrite": True,
        "progress": False,
        "vision": "c",
        "tokenizer": "d",
    }


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main([str(tmp_path), str(tmp_path.with_name("x"))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vamba: The source's model_type is 'llama'") and error.count("\n") == 1
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2


def test_interrupt(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vamba.conversion.checkpoint.convert", interrupted)
    assert main(["a", "b"]) == 130 and "interrupted" in capsys.readouterr().err


def test_usage(capsys):
    with pytest.raises(SystemExit):
        main(["a"])
    assert "DST" in capsys.readouterr().err


def test_importing_the_package_is_light():
    code = "import sys, vamba.conversion; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
