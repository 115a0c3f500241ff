"""Questions from files: what may stand in a line, and that every mistake is told with its line."""

import json

import pytest

from vamba import UserError
from vamba.evaluation.questions import read_questions


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path, **row):
    return read_questions(write(tmp_path / "data.jsonl", {"video": "a.mp4", "question": "What?", **row}))[0]


def test_a_line_becomes_a_question(tmp_path):
    row = {"id": "q7", "options": ["red", "blue"], "answer": "B", "category": "colour", "start": 1, "depth": 0.5}
    question = read_one(tmp_path, **row)
    assert question.id == "q7" and question.options == ("red", "blue") and question.answer == 1
    assert question.videos == (str(tmp_path / "a.mp4"),) and question.watched == (question.videos, 1.0, None)
    assert question.category == "colour" and question.extra == {"depth": 0.5}


@pytest.mark.parametrize(
    ("options", "answer", "index"),
    [
        (["red", "blue"], "A", 0),
        (["red", "blue"], "b", 1),
        (["red", "blue"], "(B)", 1),
        (["red", "blue"], "blue", 1),
        (["red", "blue"], "B. blue", 1),
        (["red", "blue"], 1, 1),
        (["A. red", "B. blue"], "A", 0),
        (["A. red", "B. blue"], "A. red", 0),
        (["B", "A"], "A", 1),  # a text counts before a letter
        ({"A": "red", "B": "blue"}, "B", 1),
        (["red", "blue"], None, None),
    ],
)
def test_the_right_option_may_be_named_in_many_ways(tmp_path, options, answer, index):
    assert read_one(tmp_path, options=options, answer=answer).answer == index


def test_open_questions(tmp_path):
    assert read_one(tmp_path, answer="a red car").answer == "a red car"
    assert read_one(tmp_path, answer=["two", 2]).answer == ("two", "2")
    assert read_one(tmp_path).answer is None


def test_paths_are_relative_to_the_file_or_to_the_root(tmp_path):
    path = write(tmp_path / "data.jsonl", {"video": ["a.mp4", "http://x/b.mp4", "/c.mp4"], "question": "What?"})
    assert read_questions(path)[0].videos == (str(tmp_path / "a.mp4"), "http://x/b.mp4", "/c.mp4")
    assert read_questions(path, tmp_path / "media")[0].videos[0] == str(tmp_path / "media" / "a.mp4")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "What?"}, "video is None"),
        ({"video": [], "question": "What?"}, "video is"),
        ({"video": "a.mp4"}, "question is None"),
        ({"video": "a.mp4", "question": " "}, "question is"),
        ({"video": "a.mp4", "question": "What?", "options": ["red"]}, "options has 1 texts"),
        ({"video": "a.mp4", "question": "What?", "options": "red"}, "options is 'red'"),
        ({"video": "a.mp4", "question": "What?", "options": ["red", "red"]}, "names one twice"),
        ({"video": "a.mp4", "question": "What?", "options": ["red", "blue"], "answer": "C"}, "answer is 'C'"),
        ({"video": "a.mp4", "question": "What?", "options": ["red", "blue"], "answer": 2}, "answer is 2"),
        ({"video": "a.mp4", "question": "What?", "options": ["red", "blue"], "answer": True}, "answer is True"),
        ({"video": "a.mp4", "question": "What?", "answer": {"a": 1}}, "answer is"),
        ({"video": "a.mp4", "question": "What?", "start": "1"}, "start is '1'"),
        ({"video": "a.mp4", "question": "What?", "start": 2, "end": 1}, "end is 1"),
        ({"video": "a.mp4", "question": "What?", "category": 3}, "category is 3"),
        ({"video": "a.mp4", "question": "What?", "id": None}, "id is None"),
        (["What?"], "it is a list"),
        ({"video": "a.mp4", "question": "What?", "category": "\ud800"}, "no character"),
    ],
)
def test_a_mistake_names_the_line(tmp_path, row, told):
    path = write(tmp_path / "data.jsonl", {"video": "a.mp4", "question": "What?"}, row)
    with pytest.raises(UserError, match=f"line 2: .*{told}"):
        read_questions(path)


def test_files_that_hold_no_questions(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="is no file"):
        read_questions(tmp_path)
    row = {"id": "x", "video": "a.mp4", "question": "What?"}
    with pytest.raises(UserError, match="two questions have the id 'x'"):
        read_questions(write(tmp_path / "twice.jsonl", row, row))
