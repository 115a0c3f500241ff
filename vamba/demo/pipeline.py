"""The demo from start to finish, in a staging folder that becomes the output folder at the very end.

What is unusual: an interruption at any point leaves the output folder as it was. Training videos and intermediate
checkpoints are in a subfolder that is gone by then; held-out videos stay, to be asked about with `vamba ask` and
`vamba eval`.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from vamba.conversion import convert
from vamba.errors import check_writable
from vamba.files import check_replaceable, checkpoint_files, staged_folder
from vamba.hub import write_model_card
from vamba.training import Result, finetune

from .evaluation import ask_about_videos, ask_without_video, scores
from .report import draw_report, print_examples, shown
from .tiny_checkpoints import TEXT, make_tiny_clip, make_tiny_mamba2, make_tiny_qwen2_vl
from .videos import ANSWERS, FPS, QUESTIONS, SIZE, Story, render, stories, write_video


STEPS, BATCH_SIZE, LEARNING_RATE = 400, 24, 2e-3
TRAIN_VIDEOS, TEST_VIDEOS = 1800, 64
CONVERSATIONS = 4  # about each training video
TRAIN_FRAMES = (16, 24, 32)  # several, so that length is nothing that a model could rely on
LONGER = 4  # times the longest of them, in half as many videos, the model is asked about as well
WITHOUT_VIDEO = 1 / 8  # share of the conversations that come without their video
QUESTIONS_FILE = "questions.jsonl"
RESULTS_FILE = "demo.json"  # also what tells an earlier output, which may be replaced, from anything else
KINDS = {
    "vamba": ("Vamba", "a tiny Qwen2-VL"),
    "video-ma2mba": ("Video-Ma2mba", "a tiny Mamba-2 and a tiny CLIP"),
}
# A video is 48 tokens here, not hundreds of thousands: steps are larger, and decay is slow enough to span it. The state
# of a Video-Ma2mba has to last until the questions are asked, so decay is slower still.
MIXERS = {
    "vamba": {"chunk_size": 32, "A_init_bounds": (0.1, 1.0)},
    "video-ma2mba": {"chunk_size": 16, "A_init_bounds": (0.01, 0.2)},
}
COMMON = {"state_size": 16, "head_dim": 16, "time_step_min": 0.03, "time_step_max": 0.3}


def run(
    output_dir: str | os.PathLike = "runs/demo",
    *,
    model: str = "vamba",
    seed: int = 0,
    steps: int | None = None,
    train_videos: int = TRAIN_VIDEOS,
    test_videos: int = TEST_VIDEOS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
) -> dict:
    """Runs the demo and prints what it does; the last line says the accuracy.

    Args:
        output_dir: gets the trained checkpoint, demo.png, demo.json, the held-out videos and questions.jsonl, which
            asks about them. An earlier demo's output is replaced once the new one is complete.
        model: "vamba" or "video-ma2mba".
        steps: of the training; None for the default.

    Returns:
        accuracy, text_only_accuracy, chance, accuracy_by_question, longer_accuracy (of videos `LONGER` times as long
        as the longest in the training), longer_accuracy_by_question, looked_at_event (share of the answers that looked
        most at what was asked about, None for a Video-Ma2mba), loss, seconds by phase, and the settings.

    Raises:
        UserError: the output folder cannot be used. Nothing was done.
    """
    output = Path(output_dir).expanduser().resolve()
    files = [*checkpoint_files(), RESULTS_FILE, QUESTIONS_FILE, "demo.png", "videos/*.mp4", "longer_videos/*.mp4"]
    check = partial(check_replaceable, output, "demo's output", RESULTS_FILE, files)
    check()
    check_writable(output)
    settings = {"model": model, "seed": seed, "steps": STEPS if steps is None else steps, "train_videos": train_videos}
    settings |= {"test_videos": test_videos, "batch_size": batch_size, "learning_rate": learning_rate}
    with staged_folder(output, check) as folder:
        results = _run_in(folder, settings)
    reached, longer, blind = (shown(results[name]) for name in ("accuracy", "longer_accuracy", "text_only_accuracy"))
    print(f"\ncheckpoint, results and held-out videos: {output}")
    if (looked := results["looked_at_event"]) is not None:
        print(f"where it looked most: at what was asked about for {shown(looked)} of the answers")
    print(f"without the video: accuracy {blind} (the questions alone tell nothing)")
    print(
        f"demo: accuracy {reached} on {test_videos} held-out videos (chance {shown(results['chance'])}); "
        f"{longer} at {LONGER} times the length"
    )
    return results


def _run_in(folder: Path, settings: dict) -> dict:
    work, seed, kind, seconds = folder / "work", settings["seed"], settings["model"], {}
    name, base = KINDS[kind]
    with _phase(seconds, "videos", f"writing {settings['train_videos']} + {settings['test_videos']} H.264 videos"):
        paths, told = write_videos(work / "videos", settings["train_videos"], seed=2 * seed)
        data = write_conversations(work / "videos" / "train.jsonl", paths, told, seed)
        tests = write_videos(folder / "videos", settings["test_videos"], seed=2 * seed + 1)
        frames = (LONGER * max(TRAIN_FRAMES),)
        longer = write_videos(folder / "longer_videos", -(-settings["test_videos"] // 2), 2 * seed + 1, frames)
        write_questions(folder / QUESTIONS_FILE, *(paths + more for paths, more in zip(tests, longer)))
    with _phase(seconds, "checkpoint", f"making {base} and converting to {name}"):
        checkpoint = make_checkpoint(work, seed, kind)
    with _phase(seconds, "training", "fine-tuning it on conversations about the videos, as `vamba finetune` does"):
        result = train(checkpoint, data, work / "training", settings)
        if result.folder is None:
            raise SystemExit(143)  # SIGTERM came, upon which the training ends after its step
        for path in result.folder.iterdir():
            path.rename(folder / path.name)
    with _phase(seconds, "asking", "loading it and asking about new videos"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForImageTextToText.from_pretrained(folder, device_map=device).eval()
        processor = AutoProcessor.from_pretrained(folder)
        replies, on_longer = (ask_about_videos(model, processor, *videos) for videos in (tests, longer))
        blind = ask_without_video(model, processor, *tests)
    print_examples(replies)
    results = scores(replies, blind, on_longer) | {
        "loss": [*result.losses.values()][-1],
        "seconds": seconds,
        **settings,
    }
    title = f"accuracy {shown(results['accuracy'])}, chance {shown(results['chance'])}; "
    title += f"{shown(results['longer_accuracy'])} at {LONGER} times the length"
    draw_report(folder / "demo.png", replies, processor, title)
    write_model_card(folder, model.config, repo_id=f"{kind}-demo", origin="It knows the task of `vamba demo` only.")
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    return results


def write_videos(
    folder: Path, count: int, seed: int, frames: Sequence[int] = TRAIN_FRAMES
) -> tuple[list[Path], list[Story]]:
    """Writes `count` videos of these numbers of frames; returns their paths and what happens in each."""
    folder.mkdir(parents=True)
    told = stories(count, seed, frames)
    paths = [folder / f"{index:04d}.mp4" for index in range(count)]
    for path, story in zip(tqdm(paths, desc="writing videos", unit="video"), told):
        write_video(path, render(story))
    return paths, told


def write_conversations(file: Path, paths: Sequence[Path], told: Sequence[Story], seed: int) -> Path:
    """Conversations about the videos, as a user of `vamba finetune` would write them; returns the file.

    Each asks all questions, in random order. Those without their video teach the model what the text alone is worth,
    the baseline that the demo prints beside the accuracy.
    """
    rng = random.Random(seed)
    with open(file, "w", encoding="utf-8") as lines:
        for path, story in [*zip(paths, told)] * CONVERSATIONS:
            turns = []
            for kind in rng.sample(list(QUESTIONS), len(QUESTIONS)):
                turns.append({"role": "user", "content": [{"type": "text", "text": QUESTIONS[kind]}]})
                turns.append({"role": "assistant", "content": [{"type": "text", "text": story.answer(kind)}]})
            if rng.random() >= WITHOUT_VIDEO:
                turns[0]["content"].insert(0, {"type": "video", "video": path.name})
            lines.write(json.dumps({"messages": turns}) + "\n")
    return file


def write_questions(file: Path, paths: Sequence[Path], told: Sequence[Story]) -> None:
    """The same questions as multiple choice, for `vamba eval`; the videos are below the folder of the file."""
    with open(file, "w", encoding="utf-8") as lines:
        for path, story in zip(paths, told):
            for kind, question in QUESTIONS.items():
                row = {"video": path.relative_to(file.parent).as_posix(), "question": question, "category": kind}
                row |= {"options": ANSWERS[kind], "answer": story.answer(kind)}
                lines.write(json.dumps(row) + "\n")


def make_checkpoint(folder: Path, seed: int, kind: str = "vamba") -> Path:
    """A tiny checkpoint that can spell the sentences of the demo, converted to the model by the real converter."""
    sentences = [*QUESTIONS.values(), *(answer for answers in ANSWERS.values() for answer in answers)]
    mixer = COMMON | MIXERS[kind]
    # the usual 0.02 is for thousands; a narrow model would learn slowly
    options = {"seed": seed, "initializer_range": TEXT["hidden_size"] ** -0.5}
    if kind == "video-ma2mba":
        language = make_tiny_mamba2(folder / "mamba2", sentences, mamba_config=mixer, **options)
        vision = make_tiny_clip(folder / "clip", seed=seed, image_size=SIZE, patch_size=12, depth=4)
        return convert(language, folder / kind, vision=vision, seed=seed)
    tower = {"patch_size": 12, "embed_dim": 64, "depth": 1, "num_heads": 4}
    source = make_tiny_qwen2_vl(folder / "qwen2_vl", sentences, **options, **tower)
    return convert(source, folder / kind, mamba_config=mixer, seed=seed)


def train(checkpoint: Path, data: Path, output: Path, settings: dict) -> Result:
    """What `vamba finetune` does with this recipe; the trained model is in `folder` of what is returned."""
    recipe = {
        "model_name_or_path": checkpoint,
        "dtype": "float32",
        "datasets": data,
        "fps": FPS,
        "output_dir": output,
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings["steps"] // 20,
        "weight_decay": 0.01,
        "logging_steps": max(1, settings["steps"] // 10),
        "save_strategy": "no",
        "dataloader_num_workers": 2,  # whatever the machine, as the order of the data follows from it
        "use_cpu": not torch.cuda.is_available(),
        "seed": settings["seed"],
    }
    return finetune(recipe)


@contextmanager
def _phase(seconds: dict[str, float], name: str, announcement: str):
    print(f"* {announcement}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)
