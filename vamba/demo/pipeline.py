"""The demo from start to finish, in a staging folder that becomes the output folder at the very end.

What is unusual: an interruption at any point leaves the output folder as it was. Training videos and intermediate
checkpoints are in a subfolder that is gone by then; held-out videos stay, to be asked about with `vamba ask`.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from vamba.conversion import convert
from vamba.errors import OccupiedPathError, check_writable
from vamba.files import staged_folder
from vamba.hub import write_model_card

from .evaluation import Reply, accuracy, ask_about_videos, ask_without_video, chance
from .report import draw_report
from .tiny_checkpoint import make_tiny_qwen2_vl
from .tiny_mamba2 import make_tiny_clip, make_tiny_mamba2
from .training import fine_tune, read_examples
from .videos import ANSWERS, FPS, QUESTIONS, SIZE, Story, render, stories, write_video


STEPS = 550
TRAIN_VIDEOS = 1800
TEST_VIDEOS = 64
BATCH_SIZE = 24
LEARNING_RATE = 2e-3
RESULTS_FILE = "demo.json"  # also what tells an earlier output, which may be replaced, from anything else
HIDDEN_SIZE = 64
# A video is 48 tokens here, not hundreds of thousands: steps are larger, and decay is slow enough to span it.
MAMBA_CONFIG = {
    "state_size": 16,
    "head_dim": 16,
    "chunk_size": 32,
    "time_step_min": 0.03,
    "time_step_max": 0.3,
    "A_init_bounds": (0.1, 1.0),
}
VAMBA, VIDEO_MA2MBA = "vamba", "video-ma2mba"
_ANNOUNCED = {VAMBA: "a tiny Qwen2-VL", VIDEO_MA2MBA: "a tiny Mamba-2 and a tiny CLIP"}
_NAMES = {VAMBA: "Vamba", VIDEO_MA2MBA: "Video-Ma2mba"}
# Its state has to last until the questions are asked, so decay is slower still.
MA2MBA_CONFIG = {**MAMBA_CONFIG, "chunk_size": 16, "A_init_bounds": (0.01, 0.2)}
MAX_THREADS = 4  # more only wait for each other over matrices this small


def run(
    output_dir: str | os.PathLike = "runs/demo",
    *,
    model: str = VAMBA,
    seed: int = 0,
    steps: int | None = None,
    train_videos: int = TRAIN_VIDEOS,
    test_videos: int = TEST_VIDEOS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
) -> dict:
    """Runs the demo and prints what it does; the last line says the accuracy.

    Args:
        output_dir: gets the trained checkpoint, demo.png, demo.json and the held-out videos. An earlier demo's output
            is replaced once the new one is complete.
        model: "vamba" or "video-ma2mba".
        steps: of the training; None for the default.

    Returns:
        accuracy, text_only_accuracy, chance, accuracy_by_question, loss, seconds by phase, and the settings.

    Raises:
        UserError: the output folder cannot be used. Nothing was done.
    """
    output = Path(output_dir).expanduser().resolve()
    check_output(output)
    settings = {"model": model, "seed": seed, "steps": STEPS if steps is None else steps, "train_videos": train_videos}
    settings |= {"test_videos": test_videos, "batch_size": batch_size, "learning_rate": learning_rate}
    with staged_folder(output) as folder, _few_threads():
        results = _run_in(folder, settings)
    print(f"\ncheckpoint, picture and {test_videos} held-out videos: {output}")
    print(f"without the video: accuracy {_shown(results['text_only_accuracy'])} (the questions alone tell nothing)")
    print(last_line(results))
    return results


def last_line(results: dict) -> str:
    """What the demo comes to."""
    shares = [_shown(results[name]) for name in ("accuracy", "chance")]
    return f"demo: accuracy {shares[0]} on {results['test_videos']} held-out videos (chance {shares[1]})"


def check_output(output: Path) -> None:
    """Raises UserError if `output` is something else than an earlier demo's output, or cannot be made."""
    if output.exists() and not output.is_dir():
        raise OccupiedPathError(f"{output} exists and is no folder; choose another output folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / RESULTS_FILE).is_file():
        raise OccupiedPathError(f"{output} holds something that is no demo output; choose another output folder.")
    check_writable(output)


def _run_in(folder: Path, settings: dict) -> dict:
    work, held_out = folder / "work", folder / "videos"
    seed, kind, seconds = settings["seed"], settings["model"], {}
    with _phase(seconds, "videos", f"writing {settings['train_videos']} + {settings['test_videos']} H.264 videos"):
        paths, told = write_videos(work / "videos", settings["train_videos"], seed=2 * seed)
        test_paths, test_told = write_videos(held_out, settings["test_videos"], seed=2 * seed + 1)
    with _phase(seconds, "checkpoint", f"making {_ANNOUNCED[kind]} and converting to {_NAMES[kind]}"):
        checkpoint = make_checkpoint(work, seed, kind)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        processor = AutoProcessor.from_pretrained(checkpoint)
    with _phase(seconds, "reading", "decoding the training videos"):
        examples = read_examples(paths, told, processor)
    with _phase(seconds, "training", f"fine-tuning {model.num_parameters():,} parameters with Trainer"):
        options = {key: settings[key] for key in ("steps", "batch_size", "learning_rate", "seed")}
        loss = fine_tune(model, processor, examples, work / "trainer", **options)
        model.save_pretrained(folder)
        processor.video_processor.fps = FPS  # so that it is asked as it was trained, whoever asks
        processor.save_pretrained(folder)
        write_model_card(folder, model.config, repo_id=f"{kind}-demo", origin="It knows the task of `vamba demo` only.")
    with _phase(seconds, "asking", "reloading it and asking about new videos"):
        model = AutoModelForImageTextToText.from_pretrained(folder, device_map=_device()).eval()
        processor = AutoProcessor.from_pretrained(folder)
        replies = ask_about_videos(model, processor, test_paths, test_told)
        blind = ask_without_video(model, processor, test_paths, test_told)
    _print_examples(replies)
    results = summarize(replies, blind) | {"loss": loss, "seconds": seconds, **settings}
    title = f"accuracy {_shown(results['accuracy'])}, chance {_shown(results['chance'])}"
    draw_report(folder / "demo.png", replies, processor, title)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    return results


def write_videos(folder: Path, count: int, seed: int) -> tuple[list[Path], list[Story]]:
    """Writes `count` videos; returns their paths and what happens in each."""
    folder.mkdir(parents=True)
    told = stories(count, seed)
    paths = [folder / f"{index:04d}.mp4" for index in range(count)]
    for path, story in zip(tqdm(paths, desc="writing videos", unit="video"), told):
        write_video(path, render(story))
    return paths, told


def make_checkpoint(folder: Path, seed: int, kind: str = VAMBA) -> Path:
    """A tiny checkpoint that can spell the sentences of the demo, converted to the model by the real converter."""
    sentences = [*QUESTIONS.values(), *(answer for answers in ANSWERS.values() for answer in answers)]
    if kind == VIDEO_MA2MBA:
        language = make_tiny_mamba2(
            folder / "mamba2",
            sentences,
            seed=seed,
            hidden_size=HIDDEN_SIZE,
            initializer_range=HIDDEN_SIZE**-0.5,
            mamba_config=MA2MBA_CONFIG,
        )
        vision = make_tiny_clip(folder / "clip", seed=seed, image_size=SIZE, patch_size=12, depth=4)
        return convert(language, folder / kind, vision=vision, seed=seed)
    source = make_tiny_qwen2_vl(
        folder / "qwen2_vl",
        sentences,
        seed=seed,
        hidden_size=HIDDEN_SIZE,
        num_layers=3,
        patch_size=12,
        initializer_range=HIDDEN_SIZE**-0.5,  # the usual 0.02 is for thousands; a narrow model would learn slowly
    )
    return convert(source, folder / "vamba", mamba_config=MAMBA_CONFIG, seed=seed)


def summarize(replies: Sequence[Reply], blind: Sequence[Reply]) -> dict:
    """The numbers of an evaluation, with and without video."""
    kinds = {kind: [reply for reply in replies if reply.kind == kind] for kind in QUESTIONS}
    return {
        "accuracy": accuracy(replies),
        "text_only_accuracy": accuracy(blind),
        "chance": chance(replies),
        "accuracy_by_question": {QUESTIONS[kind]: accuracy(of_kind) for kind, of_kind in kinds.items()},
    }


def _print_examples(replies: Sequence[Reply], videos: int = 3) -> None:
    shown = list(dict.fromkeys(reply.video for reply in replies))[:videos]
    for video in shown:
        print(f"\n{video.name}")
        for reply in (reply for reply in replies if reply.video == video):
            verdict = "" if reply.correct else f"   (wrong: {reply.truth})"
            print(f"  {QUESTIONS[reply.kind]:32} {reply.answer}{verdict}")


def _shown(share: float) -> str:
    """Two digits, cut off rather than rounded, so that 0.90 is never less than that."""
    return f"{math.floor(share * 100 + 1e-9) / 100:.2f}"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _phase(seconds: dict[str, float], name: str, announcement: str):
    print(f"* {announcement}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


@contextmanager
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, MAX_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
