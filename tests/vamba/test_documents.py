"""What the documents say runs: every snippet and command of them, on tiny checkpoints.

What is unusual: a command or a snippet that is new in a document fails here until it is run below or listed with the
reason why it is only parsed.
"""

import importlib
import re
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import vamba
from vamba import cli
from vamba.conversion import convert
from vamba.demo.tiny_mamba2 import make_tiny_clip, make_tiny_mamba2
from vamba.training import load_recipe

from training_data import recipe_values, write_dataset


ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "examples/accelerate/README.md"]
PROGRAMS = ("vamba", "make", "pip", "accelerate", "torchrun", "python", "tar")
# Commands that are not run whole, and why.
PARSED = {
    "make": "each is minutes; its dry run is made",
    "pip": "it needs the network; extras are looked up in pyproject.toml",
    "accelerate": "it needs GPUs; both halves are parsed, and `python -m vamba` is run",
    "torchrun": "as accelerate",
    "tar": "it needs what pip downloads",
    "vamba bench": "minutes on a CPU; tests/vamba/test_bench.py runs it",
    "vamba finetune vamba_stage1": "the recipe is for a 7B; it is parsed",
}
# Inline code with a call that stands for something longer: what is run in its place.
RUN = {
    'pipeline("image-text-to-text")': 'transformers.pipeline("image-text-to-text", model=model, processor=processor)',
    "processor.apply_chat_template(messages, ...)": (
        "inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,"
        " return_tensors='pt').to(model.device)"
    ),
    "model.generate(**inputs)": "model.generate(**inputs, max_new_tokens=2)",
    "memory = model.encode_video(...)": (
        "memory = model.encode_video(inputs['pixel_values_videos'], inputs['video_grid_thw'])"
    ),
    "generate(..., past_key_values=memory.fork())": (
        "model.generate(**question, past_key_values=memory.fork(), max_new_tokens=2)"
    ),
    "past_key_values=memory.fork()": "model.generate(**questions, past_key_values=memory.fork(), max_new_tokens=2)",
    "generate(..., past_key_values=memory.fork(max_cache_len=512))": (
        "model.generate(**question, past_key_values=memory.fork(max_cache_len=512), max_new_tokens=2)"
    ),
    'VideoChat(..., video_dtype=..., video_device="cpu")': (
        "vamba.VideoChat(model, processor, video_dtype=torch.float8_e4m3fn, video_device='cpu').watch('talk.mp4')"
    ),
    "processor(..., do_rescale=False, do_normalize=False)": (
        "processor(text='<|vision_start|><|vision_end|>', videos='talk.mp4', do_rescale=False, do_normalize=False)"
    ),
    "model.encode_video(new_frames, grid, memory=memory)": None,
    'memory.save("talk.safetensors")': None,
    "vamba.VideoMemory.load(...)": "loaded = vamba.VideoMemory.load('talk.safetensors')",
    "memory.to(dtype=torch.float8_e4m3fn)": "loaded.to(dtype=torch.float8_e4m3fn)",
    'memory.to("cpu")': None,
    "vamba.read_video(path, fps=..., num_frames=..., start=..., end=...)": (
        "vamba.read_video(path, fps=2.0, start=0.5, end=1.5); vamba.read_video(path, num_frames=3)"
    ),
    "model.enable_multi_axis_checkpointing()": None,
    "model(..., packed_lengths=[...])": "model(**packed, packed_lengths=[inputs['input_ids'].shape[1]] * 2)",
    "vamba.hub.push_to_hub(model, processor, repo_id)": "vamba.hub.push_to_hub",  # it needs the Hub; test_hub.py
    "model.to(torch.bfloat16)": None,
    "from_pretrained(dtype=...)": "AutoModelForImageTextToText.from_pretrained('runs/demo', dtype=torch.bfloat16)",
}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), re.M | re.S)


def inline(document: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text_of(document), flags=re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands() -> list[str]:
    found = []
    for document in DOCUMENTS:
        for block in (block for block in blocks(document, "") if block.split()[0] in PROGRAMS):
            for line in block.replace("\\\n", " ").splitlines():
                found += shlex.join(shlex.split(line, comments=True)).split(" '&&' ")
        found += [code for code in inline(document) if code.split()[0].split("/")[-1] in PROGRAMS and " " in code]
    return sorted({command for command in found if command and "=" not in command.split()[0]})


@pytest.fixture(scope="module")
def desk(checkpoint, clip, tmp_path_factory):
    """A folder in which the names that the documents use are there."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "runs").mkdir()
    (desk / "examples").symlink_to(ROOT / "examples")
    for name in ("runs/demo", "PATH", "SRC", "my-vamba"):
        (desk / name).symlink_to(checkpoint)
    (desk / "Qwen2-VL-folder").symlink_to(checkpoint.parent / "qwen")
    for name in ("talk.mp4", "VIDEO"):
        (desk / name).symlink_to(clip)
    convert(checkpoint, desk / "TIGER-Lab-Vamba-folder", to="original", progress=False)
    make_tiny_mamba2(desk / "mamba2-folder", ["What happens?"])
    make_tiny_clip(desk / "clip-folder")
    (desk / "talks.jsonl").symlink_to(write_dataset(desk / "data", 2))
    for index in range(2):
        (desk / f"{index}.mp4").symlink_to(desk / "data" / f"{index}.mp4")
    values = recipe_values(checkpoint, desk / "talks.jsonl", desk / "out")
    values |= {"max_steps": 1}
    (desk / "recipe.yaml").write_text(yaml.safe_dump(values))
    return desk


def test_python_of_the_readme(desk, monkeypatch):
    monkeypatch.chdir(desk)
    from qwen_vl_utils import vision_process

    monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", dict(vision_process.VIDEO_READER_BACKENDS))
    monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", None)
    names = {"torch": torch, "transformers": transformers, "path": "talk.mp4"}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec"), names)
    vision_process.get_video_reader_backend.cache_clear()
    assert names["inputs"]["pixel_values_videos"].shape[0] and len(names["videos"]) == 1
    question = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Who?"}]}]
    asked = names["processor"].apply_chat_template(question, add_generation_prompt=True)
    tokenize = names["processor"].tokenizer
    names["question"], names["questions"] = (
        tokenize(texts, return_tensors="pt").to(names["model"].device) for texts in (asked, [asked] * 2)
    )
    media = ("pixel_values_videos", "video_grid_thw")
    names["packed"] = {
        key: torch.cat([value, value], 0 if key in media else 1) for key, value in names["inputs"].items()
    }
    written = inline("README.md")
    calls = {code for code in written if "(" in code and code not in commands()}
    assert calls == set(RUN), "inline code that is new, or gone"
    names["grid"] = names["new_frames"] = None
    for code, runs in RUN.items():
        if code.startswith("model.encode_video(new"):
            names |= {"new_frames": names["inputs"]["pixel_values_videos"], "grid": names["inputs"]["video_grid_thw"]}
        exec(runs or code, names)
    for code in written:  # names of ours that are only mentioned
        if re.fullmatch(r"vamba(\.\w+)+", code) and not code.endswith(".yaml"):
            eval(code, {"vamba": vamba})
        if re.fullmatch(r"(examples|benchmarks|tests)/[\w./]+", code):
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("command", commands())
def test_command(command, desk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    program, *words = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", command))
    program = program.split("/")[-1]
    words = [word.replace("$RANK", "0").replace("$FIRST", "host").replace("RECIPE", "recipe.yaml") for word in words]
    if program == "make":
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = metadata("vamba").get_all("Provides-Extra")
        named = [extra for word in words for extra in "".join(re.findall(r"^\.\[(.*)\]$", word)).split(",") if extra]
        assert set(named) <= set(extras) and not any(word.startswith("vamba") for word in words)
    elif program in ("accelerate", "torchrun"):
        parse_launch(program, words)
    elif program == "vamba":
        run_vamba(words, tmp_path, capsys)
    else:
        assert program in PARSED


def parse_launch(program: str, words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parser = launch_command_parser() if program == "accelerate" else get_args_parser()
    args = parser.parse_args(words[1:] if program == "accelerate" else words)
    assert program == "torchrun" or Path(args.config_file).is_file()
    if args.module:
        importlib.import_module(args.training_script)
        assert importlib.util.find_spec(f"{args.training_script}.__main__")
        cli._parse(args.training_script_args)
    else:
        assert Path(args.training_script).is_file()
        load_recipe(args.training_script_args[0])


def run_vamba(words: list[str], tmp_path: Path, capsys) -> None:
    if len(words) == 1:  # only named
        with pytest.raises(SystemExit, match="^0$"):
            cli.main([*words, "--help"])
        return
    if words[0] == "convert":
        words[2] = str(tmp_path / "converted")
    if words[0] == "finetune":
        few = ["--max_steps=1", "--bf16=no", "--dtype=float32", f"--output_dir={tmp_path / 'out'}"]
        few += ["--max_pixels=2304", "--lora_r=2"] if words[1] == "vamba_lora" else []
        words = [word for word in words if word != "..."] + few
    if words[0] == "ask":
        if words[1].endswith(".safetensors"):
            assert cli.main(["ask", "VIDEO", "Who?", "--model", "PATH", "--save-memory", words[1], "--quiet"]) == 0
        words += ["--max-new-tokens", "2", "--quiet"]
    if any(" ".join(["vamba", *words]).startswith(listed) for listed in PARSED):
        cli._parse(words)
        return
    assert cli.main(words) == 0, capsys.readouterr().err


def test_the_package_is_a_program(desk):
    """`python -m vamba`, for launchers; and `vamba.hub` is there after `import vamba`."""
    code = "import runpy, sys, vamba; vamba.hub.push_to_hub; runpy.run_module('vamba', run_name='__main__')"
    arguments = [sys.executable, "-c", code, "info", "PATH"]
    done = subprocess.run(arguments, cwd=desk, capture_output=True, text=True)
    assert done.returncode == 0 and "hidden_size" in done.stdout, done.stderr


def test_python_of_a_model_card(checkpoint, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", (checkpoint / "README.md").read_text(), re.M | re.S):
        exec(block.replace('"vamba"', '"PATH"'), names)
    assert capsys.readouterr().out
