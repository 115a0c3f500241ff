"""The needle suite: that it can be solved by who sees the videos and by nobody else, and that it survives kills."""

import json
import os
import re
import resource
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from vamba.cli import main
from vamba.demo.videos import COLOURS
from vamba.errors import DiskFullError, OccupiedPathError, UserError
from vamba.evaluation.needles import FPS, NEEDLE_FRAMES, TASKS, make_needles, plan
from vamba.evaluation.questions import read_questions
from vamba.modeling.memory_files import held
from vamba.video import load_video

from grey_footage import write_footage
from kill_points import kill_at, run_to_the_end, steps


SMALL = {"lengths": (10,), "depths": (0, 0.5, 1), "videos_per_cell": 1, "progress": False}  # one video of each kind
LETTERS = "ABCD"


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    return write_footage(tmp_path_factory.mktemp("needles") / "footage")


@pytest.fixture(scope="module")
def suite(footage):
    """A small suite's folder."""
    return make_needles(footage.parent / "suite", footage=footage, **SMALL).parent


@pytest.fixture(scope="module")
def planned():
    """(video, row) of 2700 questions."""
    videos, rows = plan((10, 60, 600), (0, 0.25, 0.5, 0.75, 1), 60, seed=1)
    return [(asdict(video), row) for video, row in zip([video for video in videos for _ in TASKS], rows)]


def oracle(video: dict, text: str, options: list[str]) -> int:
    """The right option, as the needles of the manifest and the words of the question have it."""
    text, labels = text.partition(". ")[2], [needle["label"] for needle in video["needles"]]
    if text.startswith("How many"):
        return options.index(f"{len(labels)}")
    if text.startswith("In which order"):
        asked = text.partition(": ")[2].rstrip("?").split(", ")
        return options.index(", ".join(label for label in labels if label in asked))
    (label,) = (needle["label"] for needle in video["needles"] if f" {needle['colour']}" in text)
    return options.index(label)


def test_an_oracle_that_reads_the_manifest_is_always_right(suite, planned):
    videos = {video["name"]: video for video in json.loads((suite / "needles.json").read_text())["videos"]}
    questions = read_questions(suite / "questions.jsonl")
    assert len(questions) == 9 and len({question.category for question in questions}) == 9
    for question in questions:
        assert oracle(videos[Path(question.videos[0]).stem], question.text, question.options) == question.answer
        assert question.duration == 10 and question.extra["depth"] in SMALL["depths"]
    for video, row in planned:
        assert oracle(video, row["question"], row["options"]) == LETTERS.index(row["answer"])


def learned_guesses(seen: list[dict], asked: list[dict]) -> list[int]:
    """For each row the option that was right most often, of those that `seen` has in the same category."""
    offered = Counter((row["category"], option) for row in seen for option in row["options"])
    right = Counter((row["category"], row["options"][LETTERS.index(row["answer"])]) for row in seen)
    rates = {key: right[key] / count for key, count in offered.items()}
    return [max(range(4), key=lambda index: rates.get((row["category"], row["options"][index]), 0)) for row in asked]


def as_the_text_lists_them(row: dict) -> int:
    listed = row["question"].rpartition(": ")[2].rstrip("?")
    return row["options"].index(listed) if listed in row["options"] else 0


def most_alike(row: dict) -> int:
    """The option that shares most positions with the others."""
    parts = [option.split(", ") for option in row["options"]]
    return max(range(4), key=lambda index: sum(a == b for other in parts for a, b in zip(parts[index], other)))


def test_who_knows_the_text_alone_is_at_chance(planned):
    rows = [row for _, row in planned]
    for task in TASKS:
        here = [row for row in rows if row["category"].startswith(task)]
        truths = np.array([LETTERS.index(row["answer"]) for row in here])
        assert (np.bincount(truths, minlength=4) == len(here) // 4).all()
        half = len(here) // 2
        guesses = {
            "learned": np.mean(np.array(learned_guesses(here[:half], here[half:])) == truths[half:]),
            "as listed": np.mean([as_the_text_lists_them(row) for row in here] == truths),
            "alike": np.mean([most_alike(row) for row in here] == truths),
            "longest": np.mean([max(range(4), key=lambda i: len(row["options"][i])) for row in here] == truths),
        }
        for name, share in guesses.items():
            assert 0.19 < share < 0.31, (task, name)  # 3 standard deviations of 450 guesses


def test_needles_lie_apart_and_the_target_at_its_depth(planned):
    for video, row in planned:
        frames, starts = video["length"] * FPS, [needle["start"] for needle in video["needles"]]
        assert starts[0] >= 0 and starts[-1] + NEEDLE_FRAMES <= frames
        assert all(later - earlier >= NEEDLE_FRAMES for earlier, later in zip(starts, starts[1:]))
        assert len({needle["label"] for needle in video["needles"]}) == len(starts)
        assert len({needle["colour"] for needle in video["needles"]}) == len(starts)
        wanted = row["depth"] * (frames - NEEDLE_FRAMES)
        room = frames - len(starts) * NEEDLE_FRAMES  # where there is little, the others push the target aside
        assert abs(starts[video["target"]] - wanted) <= (0.5 if room > 100 else 4 * NEEDLE_FRAMES)
    others = [
        needle["start"] / FPS / video["length"]
        for video, row in planned
        if video["length"] == 600 and row["depth"] == 0
        for needle in video["needles"][1:]
    ]
    assert abs(np.mean(others) - 0.5) < 0.04


def test_one_frame_a_second_shows_every_needle(suite):
    for video in json.loads((suite / "needles.json").read_text())["videos"]:
        frames, times = load_video(suite / "videos" / f"{video['name']}.mp4", fps=1, resize=False)
        assert times.tolist() == list(range(10))
        due = {}
        for needle in video["needles"]:
            for second in range(10):
                if needle["start"] <= second * FPS < needle["start"] + NEEDLE_FRAMES:
                    due[second] = needle["colour"]
        assert list(dict.fromkeys(due.values())) == [needle["colour"] for needle in video["needles"]]
        assert [seen_colour(frame) for frame in frames.permute(0, 2, 3, 1).numpy()] == [due.get(i) for i in range(10)]


def seen_colour(picture: np.ndarray) -> str | None:
    """The name of the colour that most of the coloured pixels have, None if there are few."""
    coloured = picture[np.ptp(picture, axis=-1) > 90].astype(int)
    if len(coloured) < 500:
        return None
    return min(COLOURS, key=lambda name: np.abs(np.median(coloured, axis=0) - COLOURS[name]).sum())


def test_the_suite_is_made_asked_and_reported_in_one_command(suite, footage, checkpoint, tmp_path):
    made = ["--suite-dir", f"{suite}", "--footage", f"{footage}", "--lengths", "10", "--depths", "0,0.5,1"]
    reading = ["--num-frames", "2", "--max-pixels", "10000", "--max-new-tokens", "1", "--device", "cpu", "--quiet"]
    command = ["eval", f"{checkpoint}", "--suite", "needles", *made, "--videos-per-cell", "1", *reading]
    assert main([*command, "--output-dir", f"{tmp_path / 'run'}"]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "9 questions about 3 videos" in report and "![heatmap](heatmap.png)" in report
    assert len(re.findall(r"\| (?:retrieval|ordering|counting) \| [01.5]+ \| [01]/1 \|", report)) == 9
    assert (tmp_path / "run" / "heatmap.png").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        (["data.jsonl", "--footage", "videos"], "--footage is an option of --suite"),
        (["data.jsonl", "--suite", "needles"], "or --suite in place"),
        (["--suite", "needles", "--lengths", "5", "--footage", "nowhere"], "at least 9 s"),
        (["--suite", "needles", "--footage", "nowhere"], "nowhere is no folder"),
    ],
)
def test_mistakes_at_the_command_line(given, said, capsys):
    assert main(["eval", "model", *given, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path, footage: Path) -> None:
    make_needles(folder, footage=footage, **SMALL)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(suite, footage, tmp_path):
    _, operations = run_to_the_end(make, tmp_path / "whole", footage)
    assert contents(tmp_path / "whole") == contents(suite)
    for step in steps(operations):
        kill_at(make, tmp_path / f"{step}", footage, step=step)
        make(tmp_path / f"{step}", footage)
        assert contents(tmp_path / f"{step}") == contents(suite)


def test_what_is_there_is_not_made_again_and_what_is_missing_is(suite, footage):
    before = {path: path.stat().st_mtime_ns for path in suite.rglob("*.mp4")}
    lost, *_ = before
    lost.unlink()
    make(suite, footage)
    assert {path for path in before if path.stat().st_mtime_ns != before[path]} == {lost}


def test_two_at_once_in_one_folder_are_refused(footage, tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    with held(folder, lambda: os.open(folder, os.O_RDONLY)):
        with pytest.raises(UserError, match="suite is being written by another process"):
            make(folder, footage)
        assert not any(folder.iterdir())
    make(folder, footage)


def test_folders_of_other_needles_or_of_something_else_are_refused(suite, footage, tmp_path):
    with pytest.raises(OccupiedPathError, match="other settings or footage"):
        make_needles(suite, footage=footage, **SMALL | {"seed": 1})
    with pytest.raises(OccupiedPathError, match="other settings or footage"):
        make_needles(suite, footage=write_footage(tmp_path / "other", [(72, 128), (90, 90)]), **SMALL)
    with pytest.raises(UserError, match="must not lie in each other"):
        make_needles(footage / "suite", footage=footage, **SMALL)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OccupiedPathError, match="no needle suite"):
        make_needles(tmp_path, footage=footage, **SMALL)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"lengths": (5,)}, "at least 9 s"),
        ({"lengths": ()}, "at least 9 s"),
        ({"lengths": (float("nan"),)}, "at least 9 s"),
        ({"depths": (1.5,)}, "from 0, the beginning"),
        ({"videos_per_cell": 0}, "above 0"),
    ],
)
def test_arguments_that_cannot_be_used(wrong, said, footage, tmp_path):
    with pytest.raises(UserError, match=said):
        make_needles(tmp_path / "suite", footage=footage, **SMALL | wrong)
    assert not (tmp_path / "suite").exists()


def test_a_full_disk_is_told_and_what_was_made_is_kept(suite, footage, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in suite.rglob("*.mp4"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match="make room and call again"):
            make(tmp_path / "suite", footage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    make(tmp_path / "suite", footage)
    assert contents(tmp_path / "suite") == contents(suite)
