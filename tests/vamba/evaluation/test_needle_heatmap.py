"""The heatmap of a needle suite: what it counts, and that it is drawn."""

import pytest
from PIL import Image

from vamba.errors import UserError
from vamba.evaluation.asking import Answer
from vamba.evaluation.needle_heatmap import draw_heatmap, heatmap_table
from vamba.evaluation.questions import Question


def question(name, task, length, depth):
    return Question(name, ("a.mp4",), "?", ("a", "b"), 0, f"{task}/digit", duration=length, extra={"depth": depth})


QUESTIONS = [
    question("1", "retrieval", 10, 0.0),
    question("2", "retrieval", 10, 0.0),
    question("3", "retrieval", 60, 1.0),
    question("4", "counting", 60, 1.0),
    Question("5", ("a.mp4",), "of no suite?", ("a", "b"), 0),
]
ANSWERS = [
    *(Answer("1", rotation, correct=True) for rotation in (0, 1)),
    *(Answer("2", rotation, correct=rotation == 1) for rotation in (0, 1)),  # right in one order only
    Answer("3", correct=True),
    Answer("4", correct=False, error="cannot be read"),
    Answer("5", correct=True),
]


def test_questions_count_where_they_are_right_in_every_order():
    assert heatmap_table(QUESTIONS, ANSWERS).splitlines() == [
        "| task | depth | 10 s | 60 s |",
        "|---|---|---|---|",
        "| retrieval | 0 | 1/2 |  |",
        "| retrieval | 1 |  | 1/1 |",
        "| counting | 1 |  | 0/1 |",
    ]


def test_the_picture_has_a_panel_for_each_task(tmp_path):
    widths = []
    for questions in (QUESTIONS, QUESTIONS[:3]):
        with Image.open(draw_heatmap(tmp_path / "needles.png", questions, ANSWERS)) as picture:
            widths.append(picture.width)
            colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
        assert {(0, 104, 55), (254, 255, 190)} <= colours  # all right, half right
    assert widths[0] == 2 * widths[1]


def test_answers_to_other_questions_have_no_heatmap(tmp_path):
    with pytest.raises(UserError, match="needle suite"):
        draw_heatmap(tmp_path / "needles.png", QUESTIONS[4:], ANSWERS)
