"""`vamba eval` from files to a report: resumed, killed, on two processes, with wrong arguments."""

import json
import os

import pytest

import vamba.evaluation.runner as runner
from vamba import UserError
from vamba.cli import main
from vamba.evaluation import evaluate, read_questions

from kill_points import kill_at, moments, run_to_the_end
from training_data import run_together


OPTIONS = {"progress": False, "max_new_tokens": 3, "device": "cpu"}


def read_answers(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def run(checkpoint, asked, folder, **options):
    return evaluate(str(checkpoint), asked, folder, **OPTIONS, **options)


@pytest.fixture(scope="module")
def finished(checkpoint, asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(checkpoint, asked, folder)


def test_a_run_leaves_answers_numbers_and_a_report(finished, asked):
    folder, summary = finished
    assert {path.name for path in folder.iterdir()} == {
        "answers.jsonl", "questions.jsonl", "report.md", "report.png", "run.json", "summary.json",
    }  # fmt: skip
    answers = read_answers(folder)
    assert [answer["id"] for answer in answers] == [question.id for question in read_questions(asked)]
    right = sum(answer.get("correct") is True for answer in answers)
    assert summary["score"]["right"] == right and summary["score"]["total"] == 8
    assert json.loads((folder / "summary.json").read_text()) == summary
    report = (folder / "report.md").read_text()
    assert "broken.mp4" in report and "colour" in report and f"accuracy {right / 8:.3f}" in report


def test_a_finished_run_is_not_asked_again(finished, checkpoint, asked, monkeypatch):
    folder, summary = finished
    before = (folder / "answers.jsonl").read_bytes()
    (broken,) = (answer for answer in read_answers(folder) if "error" in answer)
    watched = []
    monkeypatch.setattr(runner.VideoChat, "watch", lambda chat, video, **options: watched.append(video) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what was an error is tried again, and nothing else
        run(checkpoint, asked, folder)
    assert [os.path.basename(video) for video in watched] == ["broken.mp4"] and broken["id"] == "broken"
    assert (folder / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"id": "place1", "rota', b'{"id": "place1"}'])
def test_a_killed_run_goes_on_where_it_was(finished, checkpoint, asked, tmp_path, torn):
    folder, summary = finished
    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    other = tmp_path / "run"
    other.mkdir()
    for name in ("run.json", "questions.jsonl"):
        (other / name).write_bytes((folder / name).read_bytes())
    marked = lines[0].replace(b'"reply": "', b'"reply": "asked before ')
    (other / "answers.rank0.jsonl").write_bytes(marked + lines[1] + torn)
    (other / "answers.rank3.jsonl").write_bytes(lines[5])  # of a process that is no more
    assert run(checkpoint, asked, other) == summary
    answers = read_answers(other)
    assert answers[0]["reply"].startswith("asked before") and not list(other.glob("answers.rank*"))
    assert answers[1:] == read_answers(folder)[1:]
    assert (other / "report.md").read_text() == (folder / "report.md").read_text()


def test_kills_at_any_moment_cost_nothing_but_time(finished, checkpoint, asked, tmp_path):
    folder, summary = finished
    seconds, _ = run_to_the_end(run, checkpoint, asked, tmp_path / "whole")
    for index, moment in enumerate(moments(seconds)):
        other = tmp_path / f"killed{index}"
        kill_at(run, checkpoint, asked, other, seconds=moment)
        assert run(checkpoint, asked, other) == summary
        assert (other / "answers.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()


def test_two_processes_answer_as_one(finished, checkpoint, asked, tmp_path):
    folder, summary = finished
    code = "import sys; from vamba.cli import main; sys.exit(main(['eval', *sys.argv[1:]]))"
    words = [str(checkpoint), str(asked), "--output-dir", str(tmp_path / "run"), "--max-new-tokens=3", "--device=cpu"]
    told = run_together(code, words, tmp_path)
    assert "accuracy" in told[0] and told[1] == ""
    assert read_answers(tmp_path / "run") == read_answers(folder)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))


@pytest.mark.parametrize(
    ("options", "told"),
    [({"protocol": "plain"}, "protocol was"), ({"circular": True}, "circular was"), ({"limit": 3}, "questions was")],
)
def test_a_folder_holds_one_run_only(finished, checkpoint, asked, options, told):
    with pytest.raises(UserError, match=f"holds the answers of another run: {told}"):
        run(checkpoint, asked, finished[0], **options)


def test_what_the_processor_cannot_read_is_told_once(ma2mba, asked, tmp_path):
    with pytest.raises(UserError, match="max_side"):
        run(ma2mba, asked, tmp_path / "run", protocol="vamba-videomme")


def test_a_part_of_each_video(checkpoint, asked, tmp_path):
    reading = {"start": 0.5, "end": 1.5}  # which questions with a span of their own replace
    assert run(checkpoint, asked, tmp_path / "run", reading=reading, limit=2)["score"]["total"] == 2
    reading = {"start": 100.0}
    summary = run(checkpoint, asked, tmp_path / "late", reading=reading, limit=2)
    assert sum(summary["unusable"].values()) == 2 and "past the end" in [*summary["unusable"]][0]


def test_damaged_questions_of_a_run_are_other_questions(finished, checkpoint, asked, tmp_path):
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"colour", b"col\x80ur"))
    with pytest.raises(UserError, match="damaged|other questions"):
        run(checkpoint, asked, tmp_path)
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "questions.jsonl").unlink()
    (tmp_path / "questions.jsonl").symlink_to("/dev/zero")  # which has no end
    with pytest.raises(UserError, match="other questions"):
        run(checkpoint, asked, tmp_path)


def test_what_was_refused_does_not_occupy_a_folder(finished, checkpoint, asked, tmp_path):
    with pytest.raises(UserError, match="max_pixels=100"):
        run(checkpoint, asked, tmp_path / "run", reading={"max_pixels": 100})
    assert run(checkpoint, asked, tmp_path / "run") == finished[1]


@pytest.mark.parametrize(
    "left", [["questions.jsonl"], ["partial_questions.jsonl"], ["questions.jsonl", "partial_run.json"]]
)
def test_what_a_run_leaves_that_was_killed_as_it_began(finished, checkpoint, asked, tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    assert run(checkpoint, asked, tmp_path) == finished[1]
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in finished[0].iterdir()} <= {*left}


def test_the_same_run_may_be_spelt_in_other_words(finished, checkpoint, asked, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert evaluate(checkpoint.name, asked, finished[0], **OPTIONS, dtype="auto", load_in_4bit=False) == finished[1]


def test_letters_are_taken_off_options_once(checkpoint, clip, tmp_path):
    row = {"video": str(clip), "question": "Who?", "options": ["A. A. Smith", "B. B. Jones"], "answer": "B. Jones"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    for _ in range(2):
        run(checkpoint, tmp_path / "data.jsonl", tmp_path / "run")
    (question,) = runner.RunFolder(tmp_path / "run").questions()
    assert question.options == ("A. Smith", "B. Jones") and question.answer == 1


def test_runs_about_other_videos_are_not_compared(finished, checkpoint, asked, tmp_path, capsys):
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    moved = [row | {"video": str(asked.parent / row["video"])} for row in rows[:2]]
    others = [rows[2] | {"video": str(asked.parent / "0.mp4")}]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*moved, *others]))
    run(checkpoint, tmp_path / "data.jsonl", tmp_path / "run")
    assert main(["eval", "--compare", str(finished[0]), str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "2 questions in common" in told and "8 questions are of one only" in told and "differ in: questions" in told


def test_other_folders_are_left_alone(checkpoint, asked, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no evaluation"):
        run(checkpoint, asked, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_in_use_is_refused(finished, checkpoint, asked):
    folder, _ = finished
    with runner.RunFolder(folder).locked(), pytest.raises(UserError, match="another process"):
        run(checkpoint, asked, folder)


def test_the_command_line(finished, checkpoint, asked, tmp_path, capsys):
    folder, summary = finished
    words = ["eval", str(checkpoint), str(asked), "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*words, "--likelihood", "--circular", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "accuracy" in told and "in the first order" in told and str(tmp_path / "run") in told
    assert main(["eval", "--compare", str(folder), str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "8 questions in common" in told and "McNemar" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "MODEL and DATA.jsonl are needed"),
        (["{model}"], "MODEL and DATA.jsonl are needed"),
        (["{model}", "nothing.jsonl"], "nothing.jsonl"),
        (["--model", "{model}", "nothing.jsonl"], "nothing.jsonl"),
        (["{model}", "{data}", "--model", "another"], "give one of them"),
        (["runs/nothing", "{data}"], "runs/nothing"),
        (["{model}", "{data}", "--protocol", "paper"], "give one of letters"),
        (["{model}", "{data}", "--adapter", "nothing"], "nothing"),
        (["{model}", "{data}", "--limit", "0"], "--limit"),
        (["{model}", "{data}", "--fps", "1", "--num-frames", "8"], "exclude each other"),
        (["--compare", "{data}", "{data}"], "holds no run.json"),
        (["{model}", "--compare", "a", "b"], "no model"),
        (["{model}", "--suite", "needles", "--media-root", "."], "leave it out"),
        (["{model}", "{data}", "--start", "100", "--quiet"], "None of the videos could be used"),
        (["{model}", "{data}", "--load-in-4bit", "--load-in-8bit"], "one of them"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, told, checkpoint, asked, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.format(model=checkpoint, data=asked) for word in words]
    try:
        code = main(["eval", *words])
    except SystemExit as exit:  # argparse's
        code = exit.code
    assert code == 2
    assert told in (line := capsys.readouterr().err) and line.count("\n") == 1
