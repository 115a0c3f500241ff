"""The heatmap of a needle suite: what it counts, and that it is drawn."""

from PIL import Image

from vamba.evaluation.needle_heatmap import draw_heatmap, has_depths, heatmap_table
from vamba.evaluation.questions import Question


def question(name, task, length, depth):
    return Question(name, ("a.mp4",), "?", ("a", "b"), 0, f"{task}/digit", duration=length, extra={"depth": depth})


QUESTIONS = [
    question("1", "retrieval", 10, 0.0),
    question("2", "retrieval", 10, 0.0),
    question("3", "retrieval", 60, 1.0),
    question("4", "counting", 60, 1.0),
    Question("6", ("a.mp4",), "of no suite?", ("a", "b"), 0, "pools", duration=10, extra={"depth": "shallow"}),
    Question("5", ("a.mp4",), "of no suite?", ("a", "b"), 0),
]
RIGHT = {"1": True, "2": False, "3": True, "4": False, "5": True, "6": True}


def test_cells_are_counted_for_each_task():
    assert heatmap_table(QUESTIONS, RIGHT).splitlines() == [
        "| task | depth | 10 s | 60 s |",
        "|---|---|---|---|",
        "| retrieval | 0 | 1/2 | 0/0 |",
        "| retrieval | 1 | 0/0 | 1/1 |",
        "| counting | 1 |  | 0/1 |",
    ]
    assert has_depths(QUESTIONS) and not has_depths(QUESTIONS[4:])


def test_the_picture_has_a_panel_for_each_task(tmp_path):
    widths = []
    for questions in (QUESTIONS, QUESTIONS[:3]):
        with Image.open(draw_heatmap(tmp_path / "needles.png", questions, RIGHT)) as picture:
            widths.append(picture.width)
            colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
        assert {(0, 104, 55), (254, 255, 190)} <= colours  # all right, half right
    assert widths[0] == 2 * widths[1]
