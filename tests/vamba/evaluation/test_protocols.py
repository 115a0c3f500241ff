"""The presets ask word for word as the scripts of Vamba's repository do (eval/utils_*.py, eval/eval_*.py)."""

import pytest

from vamba.evaluation import PROTOCOLS, Question


SELECT = "Select the best answer to the following multiple-choice question based on the video."
FOUR = "Respond with only the letter (A, B, C, or D) of the correct option."
FIVE = "Respond with only the letter (A, B, C, D, or E) of the correct option."
LINES = "A. a cup\nB. a man\nC. rain\nD. it ends"


@pytest.mark.parametrize(
    "name, prompt",
    [
        ("lvbench", f"{SELECT}\n{FOUR}\nWhat is it?\n(A) a cup\n(B) a man\n(C) rain\n(D) it ends"),
        ("videomme", f"{SELECT}\n{FOUR}\nWhat is it?\nA. a cup B. a man C. rain D. it ends"),
        ("mlvu", f"{SELECT} {FOUR}\nWhat is it?\n{LINES}"),
        ("longvideobench", f"{SELECT} {FOUR}\nWhat is it?\n{LINES}"),
        ("nextqa", f"{SELECT} {FIVE}\nWhat is it?\n{LINES}"),
        ("hourvideo", f"{SELECT}\nWhat is it?\n{LINES}\n{FIVE}"),
        (
            "mvbench",
            f"Question: What is it?\n{LINES}\nAnswer with the option's letter from the given choices directly.",
        ),
    ],
)
def test_the_prompts_of_vambas_scripts(name, prompt):
    protocol = PROTOCOLS[f"vamba-{name}"]
    question = Question("1", ("a.mp4",), "What is it?", ("a cup", "a man", "rain", "it ends"))
    assert protocol.prompt(question, range(4)) == prompt
    assert protocol.tokens(question) == 512


def test_what_the_papers_watch():
    def watched(name):
        return PROTOCOLS[name].reading["num_frames"], PROTOCOLS[name].reading["max_side"]

    assert watched("vamba-lvbench") == (1024, 560) and watched("vamba-hourvideo") == (128, 360)
    others = [name for name in PROTOCOLS if name.startswith("vamba-") and not name.endswith(("lvbench", "hourvideo"))]
    assert len(others) == 6 and {watched(name) for name in others} == {(512, 480)}
    assert PROTOCOLS["video-ma2mba"].reading == {"fps": 1.0}
