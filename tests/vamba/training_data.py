"""What the tests of training share: a folder of the demo's videos with questions and answers, recipes for it, and
processes of their own.

What is unusual: those are forked from one that has imported the library and done nothing else, as importing it takes
several seconds and a process that has trained cannot be forked.
"""

import io
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from vamba.demo.videos import QUESTIONS, render, stories, write_video
from vamba.training import finetune


WINDOW = 12  # draws among which samples of a batch are chosen; see `vamba.data.stream`
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["vamba.cli", "vamba.training.run", "vamba.hub", "datasets"])


def start(code: str, arguments: list[str], output: Path, **environment: str) -> multiprocessing.Process:
    """Runs `code` on one core, as `python -c` would, and writes what it prints to `output`, `.out` and `.err`."""
    process = PROCESSES.Process(target=_run, args=(code, arguments, output, environment))
    process.start()
    return process


def _run(code: str, arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    from vamba.data import stream

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as it would be in a new process: of data workers
    torch.set_num_threads(1)
    stream.WINDOW = WINDOW
    sys.argv[1:] = arguments
    exec(code, {"__name__": "__main__"})
    sys.stdout.flush()


def run_together(code: str, arguments: list[str], folder: Path, count: int = 2) -> list[str]:
    """Runs `code` in processes that find each other, as a launcher starts them; what each has printed."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        start(code, arguments, folder / f"rank{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(count)
    ]
    try:
        for process in running:
            process.join(100)
    finally:  # one may wait for the other for ever
        for process in running:
            process.kill()
    printed = {path.name: path.read_text() for path in folder.glob("rank*")}
    assert all(process.exitcode == 0 for process in running), printed
    return [printed[f"rank{rank}.out"] for rank in range(count)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_dataset(folder: Path, count: int, seed: int = 0, questions: int = 3) -> Path:
    """`count` videos and train.jsonl: a conversation about each, with 1 to `questions` questions in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for index, story in enumerate(stories(count, seed)):
            write_video(folder / f"{index}.mp4", render(story))
            file.write(json.dumps({"id": f"v{index}", "messages": turns(story, index % questions + 1, index)}) + "\n")
    return folder / "train.jsonl"


def turns(story, count: int, index: int) -> list[dict]:
    messages = []
    for kind, question in list(QUESTIONS.items())[:count]:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": story.answer(kind)})
    messages[0]["content"].insert(0, {"type": "video", "video": f"{index}.mp4"})
    return messages


def recipe_values(model: Path, data: Path, output: Path, **keys) -> dict:
    """A recipe that runs on a CPU in seconds."""
    return {
        "model_name_or_path": str(model),
        "dtype": "float32",
        "datasets": [str(data)],
        "fps": 8,
        "output_dir": str(output),
        "max_steps": 6,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **keys,
    }


def run(values: dict, resume: bool = False, **keys):
    return finetune(values | keys, resume=resume)


def load(folder: Path, dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def example(*media, question="What?"):
    """An example that asks one question about the given items."""
    content = [*media, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]}


def uniform(*media, question="What?"):
    """The same with a list of items for each turn: what `datasets` makes a table of."""
    messages = example(*media, question=question)["messages"]
    return {"messages": [messages[0], {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]}


def video(path, **options):
    return {"type": "video", "video": str(path), **options}


def as_png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
