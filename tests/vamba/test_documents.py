"""What the documents say is true: their Python runs, their commands parse or run, their links and names lead somewhere.

What is unusual: a program or a block that is new in a document fails here until it is run below, or listed with the
reason why it is only parsed.
"""

import ast
import importlib
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import metadata
from itertools import dropwhile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import vamba
from vamba import cli
from vamba.conversion import convert
from vamba.data.conversations import to_messages
from vamba.demo.tiny_checkpoints import make_tiny_clip, make_tiny_mamba2
from vamba.evaluation import evaluate
from vamba.modeling import VambaConfig
from vamba.training import load_recipe, shipped_recipes
from vamba.training.arguments import DataArguments, DatasetArguments, ModelArguments, VambaTrainingArguments

from training_data import recipe_values, write_dataset


ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")))
# Commands that are not run, and why.
PARSED = {
    "make": "each is minutes; its dry run is made",
    "pip": "it needs the network; extras are looked up in pyproject.toml",
    "accelerate": "it needs GPUs; both halves are parsed, and `python -m vamba` is run",
    "torchrun": "as accelerate",
    "tar": "it needs what pip downloads",
    "python": "benchmarks need a GPU; the script must be there, and an example has a test of its own",
    "hf": "it needs the network, for 23 GB; its options are looked up",
    "lmms-eval": "it needs the extra `eval`, with which test_harness.py runs it; the model's arguments are looked up",
    "pre-commit": "it changes the hooks of git",
    "pytest": "it tests what is tested here; the file must be there",
    "curl": "it asks a server, as the tests of the server do",
    "vamba serve": "it serves until it is ended; its own tests run it",
    "vamba bench": "minutes on a CPU; its own tests run it",
    "vamba demo": "minutes; its own tests run it",
    "vamba eval MODEL --suite": "minutes, and footage that is not here; its own tests run it",
    "vamba finetune vamba_stage": "the recipes are for a 7B; they are read",
}
PROGRAMS = {listed.split()[0] for listed in PARSED}
# Blocks that are neither Python nor commands, by how they begin, and what they are.
OTHER_BLOCKS = {
    "a       = SelfAttention_l(h)": "equations",
    '{"video": "a.mp4"': "questions, which `desk` writes to a file for `vamba eval`",
    '{"messages": ': "data, which test_examples_of_data reads",
    "eval_datasets: ": "a part of a recipe, the keys of which are looked up",
}
FOLDERS = (
    "modeling",
    "conversion",
    "vamba",
    "docs",
    "examples",
    "benchmarks",
    "tests",
    "model_cards",
    ".ci",
    ".github",
)
OBJECTS = {
    "vamba": vamba,
    "torch": torch,
    "model": vamba.VambaForConditionalGeneration,
    "processor": vamba.VambaProcessor,
    "memory": vamba.VideoMemory,
    "chat": vamba.VideoChat,
}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def fences(document: str) -> list[tuple[str, str, str]]:
    """Indent, language and content of all blocks at once, as the end of one looks like the beginning of another."""
    found = re.findall(r"^( *)```(\S*)\n(.*?)^ *```$", text_of(document), re.M | re.S)
    assert text_of(document).count("```") == 2 * len(found)
    return found


def blocks(document: str, language: str) -> list[str]:
    return [block for _, spoken, block in fences(document) if spoken == language]


def is_commands(block: str) -> bool:
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return bool(lines) and all(program_of(line) in PROGRAMS for line in lines)


def program_of(command: str) -> str:
    """The first word that sets no variable, without its folder."""
    words = (word for word in command.split() if "=" not in word)
    return next(words, "").split("/")[-1]


def inline(document: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text_of(document), flags=re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands() -> list[str]:
    found = []
    for document in DOCUMENTS:
        for block in filter(is_commands, blocks(document, "")):
            for line in block.replace("\\\n", " ").splitlines():
                found += shlex.join(shlex.split(line, comments=True)).split(" '&&' ")
        found += [code for code in inline(document) if program_of(code) in PROGRAMS and " " in code]
    return sorted({command for command in found if command})


@pytest.fixture(scope="module")
def desk(checkpoint, clip, tmp_path_factory):
    """A folder in which the names that the documents use are there."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "runs" / "stage1").mkdir(parents=True)
    (desk / "examples").symlink_to(ROOT / "examples")
    demo = shutil.copytree(checkpoint, desk / "runs" / "demo")
    vocabulary = range(VambaConfig.from_pretrained(demo).text_config.vocab_size)
    # its answers end with their first word, as they mean nothing anyhow
    (demo / "generation_config.json").write_text(json.dumps({"eos_token_id": [*vocabulary], "pad_token_id": 0}))
    for name in ("runs/stage1/final", "MODEL", "PATH", "SRC", "OLD", "my-vamba"):
        (desk / name).symlink_to(demo)
    (desk / "Qwen2-VL-folder").symlink_to(checkpoint.parent / "qwen")
    for name in ("a.mp4", "b.mp4", "talk.mp4", "VIDEO", "runs/demo/a.mp4", "runs/demo/b.mp4"):
        (desk / name).symlink_to(clip)
    Image.new("RGB", (64, 64)).save(desk / "slide.png")
    convert(checkpoint, desk / "TIGER-Lab-Vamba-folder", to="original", progress=False)
    make_tiny_mamba2(desk / "mamba2-folder", ["What happens?"])
    make_tiny_clip(desk / "clip-folder")
    for name in ("talks.jsonl", "captions.jsonl"):
        (desk / name).symlink_to(write_dataset(desk / "data", 2))
    for index in range(2):
        (desk / f"{index}.mp4").symlink_to(desk / "data" / f"{index}.mp4")
    questions = next(block for block in blocks("docs/evaluation.md", "") if block.startswith("{"))
    for name in ("questions.jsonl", "DATA.jsonl", "runs/demo/questions.jsonl"):
        (desk / name).write_text(questions)
    for name in ("before", "after"):
        options = {"progress": False, "max_new_tokens": 2, "device": "cpu"}
        evaluate(str(checkpoint), desk / "questions.jsonl", desk / "runs" / f"eval-{name}", **options)
    values = recipe_values(checkpoint, desk / "talks.jsonl", desk / "out", max_steps=1)
    (desk / "recipe.yaml").write_text(yaml.safe_dump(values))
    return desk


@pytest.mark.parametrize(
    "document",
    [
        document for document in DOCUMENTS if blocks(document, "python") and document != "docs/serving.md"
    ],  # see serving/
)
def test_python(document, desk, monkeypatch):
    """All of a document in one namespace, as a reader would type it."""
    from qwen_vl_utils import vision_process

    monkeypatch.chdir(desk)
    monkeypatch.setattr(vision_process, "VIDEO_READER_BACKENDS", dict(vision_process.VIDEO_READER_BACKENDS))
    monkeypatch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", None)
    names = {}
    for block in blocks(document, "python"):
        exec(compile(block, document, "exec"), names)
    vision_process.get_video_reader_backend.cache_clear()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_and_command_is_known(document):
    """All of a document's code is what the other tests look at."""
    for indent, language, block in fences(document):
        assert not indent and language in ("", "python", "json", "yaml"), block
        assert language == "python" or is_commands(block) or block.startswith(tuple(OTHER_BLOCKS)), block
    for code in inline(document):  # a word, and an option further on
        if re.match(r"[a-z.][\w./-]* (.* )?--\w", code):
            assert program_of(code) in PROGRAMS, code


def test_a_part_of_a_recipe():
    kinds = (ModelArguments, DataArguments, DatasetArguments, VambaTrainingArguments)
    keys = {field.name for kind in kinds for field in fields(kind)}
    for block in blocks("docs/training.md", "yaml"):
        assert yaml.safe_load(block).keys() <= keys


def test_extras_of_the_readme():
    project = text_of("pyproject.toml").split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    table = text_of("README.md").split("| Extra |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.M) and set(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == set(
        re.findall(r"^([\w-]+) = ", project, re.M)
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    text = re.sub(r"```.*?```", "", text_of(document), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        path = (ROOT / document).parent / path if path else ROOT / document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names(document):
    """Files, attributes and arguments that are named within sentences and tables."""
    for code in inline(document):
        if code.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and " " not in code:
            assert list(ROOT.glob(code.rstrip("/"))), code
        elif re.match(rf"({'|'.join(OBJECTS)})\.\w", code) and not code.endswith((".yaml", ".md", ".py")):
            check_expression(ast.parse(code.replace("...", "None"), mode="eval").body)


def check_expression(node: ast.expr) -> None:
    keywords = [keyword.arg for keyword in node.keywords] if isinstance(node, ast.Call) else []
    chain = []
    node = node.func if isinstance(node, ast.Call) else node
    while isinstance(node, ast.Attribute):
        chain.insert(0, node.attr)
        node = node.value
    found = OBJECTS[node.id]
    for name in chain:
        if inspect.ismodule(found) and not hasattr(found, name):
            found = importlib.import_module(f"{found.__name__}.{name}")
        else:
            found = getattr(found, name)
    if keywords:
        parameters = inspect.signature(found).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        assert takes_any or set(keywords) <= set(parameters), (chain, keywords)


@pytest.mark.parametrize("command", commands())
def test_command(command, desk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    words = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", command))
    program, *words = dropwhile(lambda word: "=" in word, words)  # variables
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
        monkeypatch.setattr(sys, "stdin", io.StringIO("What happens?\n/quit\n"))
        run_vamba(words, tmp_path, capsys)
    elif program == "pytest":
        assert all((ROOT / word).is_file() for word in words)
    elif program == "python" and words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests" / "examples").glob("*.py"))
        assert not words[0].startswith("examples/") or Path(words[0]).stem in tests
    elif program == "hf":
        called = getattr(importlib.import_module(f"huggingface_hub.cli.{words[0]}"), words[0])
        options = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert options <= set(inspect.signature(called).parameters)
    elif program == "lmms-eval":
        check_lmms_eval(words)
    else:
        assert program in PARSED


def check_lmms_eval(words: list[str]) -> None:
    given = words[words.index("--model_args") + 1] if "--model_args" in words else ""
    harness = text_of("vamba/evaluation/harness.py")
    assert all(f'"{name}"' in harness for name in re.findall(r"(\w+)=", given))


def parse_launch(program: str, words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    if words == ["launch"]:  # only named
        return
    parser = launch_command_parser() if program == "accelerate" else get_args_parser()
    args = parser.parse_args(words[1:] if program == "accelerate" else words)
    assert program == "torchrun" or args.config_file is None or Path(args.config_file).is_file()
    script = args.training_script
    if script == "lmms_eval":
        check_lmms_eval(args.training_script_args)
    elif args.module:
        importlib.import_module(script)
        assert importlib.util.find_spec(f"{script}.__main__")
        if args.training_script_args[0] == "finetune":
            load_recipe(args.training_script_args[1], args.training_script_args[2:])
        else:
            assert not cli._parser().parse_known_args(args.training_script_args)[1]
    elif script.startswith("benchmarks/"):
        assert (ROOT / script).is_file()
    else:
        assert Path(script).is_file()
        load_recipe(args.training_script_args[0], args.training_script_args[1:])


def run_vamba(words: list[str], tmp_path: Path, capsys) -> None:
    if words[0].startswith("--"):
        with pytest.raises(SystemExit, match="^0$"):
            cli.main(words)
        return
    if all(word.startswith("--") for word in words[1:]):  # only named
        with pytest.raises(SystemExit, match="^0$"):
            cli.main([words[0], "--help"])
        assert set(words[1:]) <= set(capsys.readouterr().out.split())
        return
    if words[0] == "convert":
        words[2] = str(tmp_path / "converted")
    if words[0] == "finetune":
        words = [word for word in words if word not in ("...", "--resume")]
        words += ["--max_steps=1", "--bf16=no", "--dtype=float32", f"--output_dir={tmp_path / 'out'}"]
        small = ["--max_pixels=2304", "--lora_r=2", "--max_video_tokens=500", "--batch_video_tokens=500"]
        words += [*small, "--global_batch_size=1", "--dataloader_num_workers=0"] if words[1] == "vamba_lora" else []
        if words[1].startswith("vamba_stage"):
            load_recipe(words[1], words[2:])
            return
    if words[0] in ("ask", "chat"):
        if words[1].endswith(".safetensors"):
            assert cli.main(["ask", "VIDEO", "Who?", "--model", "PATH", "--save-memory", words[1], "--quiet"]) == 0
        if "--save-memory" in words:
            words[words.index("--save-memory") + 1] = str(tmp_path / "memory.safetensors")
        words += ["--max-new-tokens", "2", "--quiet"]
    if any(" ".join(["vamba", *words]).startswith(listed) for listed in PARSED):
        assert not cli._parser().parse_known_args(words)[1]
        return
    assert cli.main(words) == 0, capsys.readouterr().err


def test_every_file_of_the_model_has_its_room():
    table = text_of("docs/architecture.md").split("| File of `modeling/` |")[1].split("\n\n")[0]
    found = [{path.name for path in (ROOT / "modeling").glob(name)} for name in re.findall(r"`([\w*]+\.py)`", table)]
    assert all(found)
    assert {path.name for path in (ROOT / "modeling").glob("*.py")} - {"__init__.py"} == set().union(*found)


def test_every_key_of_a_recipe_is_explained():
    """And nothing is explained that is no key."""
    text = text_of("docs/training.md")
    explained = {key for cell in re.findall(r"^\| (`[a-z].*?) \|", text, re.M) for key in re.findall(r"`(\w+)`", cell)}
    transformers_own = {field.name for base in VambaTrainingArguments.__mro__[1:-1] for field in fields(base)}
    kinds = (ModelArguments, DataArguments, DatasetArguments, VambaTrainingArguments)
    keys = {field.name for kind in kinds for field in fields(kind) if field.init and field.name[0] != "_"}
    assert keys - transformers_own <= explained, keys - transformers_own - explained
    assert explained - set(shipped_recipes()) <= keys, explained - set(shipped_recipes()) - keys
    assert set(shipped_recipes()) <= explained


def test_examples_of_data():
    for block in blocks("docs/training.md", "json"):
        for line in block.splitlines():
            assert to_messages(json.loads(line))[0]["content"][0]["type"] == "video"


def test_the_headline_figure_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    drawing = f"import headline_figure, pathlib; headline_figure.draw(pathlib.Path({str(tmp_path / 'new.svg')!r}))"
    subprocess.run([sys.executable, "-c", drawing], cwd=ROOT / "benchmarks", check=True)
    drawn, kept = (path.read_text() for path in (tmp_path / "new.svg", ROOT / "docs" / "headline.svg"))
    titles = re.findall(r">([^<>]+)</text>", drawn)
    assert titles and titles == re.findall(r">([^<>]+)</text>", kept)


def test_the_architecture_figure_is_what_its_script_draws(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "architecture_figure.py"))
    script["draw"](tmp_path / "new.svg")
    assert (tmp_path / "new.svg").read_text("utf-8") == (ROOT / "docs" / "architecture.svg").read_text("utf-8")


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
