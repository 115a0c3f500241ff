"""Numbers of a run, against those computed by hand or by others."""

import pytest

from vamba.evaluation.asking import Answer
from vamba.evaluation.questions import Question
from vamba.evaluation.scoring import Score, compare, outcomes, summarize


def question(name, category=None, answer=0, **fields):
    return Question(name, (f"{name}.mp4",), "What?", ("red", "blue"), answer, category, **fields)


def test_wilsons_interval():
    low, high = Score(8, 10).interval  # as statsmodels' proportion_confint(8, 10, method="wilson") gives it
    assert (low, high) == (pytest.approx(0.490162, abs=1e-5), pytest.approx(0.943318, abs=1e-5))
    assert Score(0, 5).interval[0] == 0 and Score(5, 5).interval[1] == 1


def test_circular_scoring_wants_every_order():
    questions = [question("a"), question("b")]
    answers = [Answer("a", 0, "A", 0, True), Answer("a", 1, "B", 0, True)]
    answers += [Answer("b", 0, "A", 0, True), Answer("b", 1, "A", 1, False)]
    assert outcomes(questions, answers, circular=True) == {"a": True, "b": False}
    assert outcomes(questions, answers) == {"a": True, "b": True}
    summary = summarize(questions, answers, circular=True)
    assert summary["score"]["accuracy"] == 0.5 and summary["first_order"]["accuracy"] == 1
    assert summary["chance"] == 0.25


def test_parts_and_what_could_not_be_used():
    questions = [question("a", "x", duration=30.0), question("b", "x"), question("c", "y"), question("d", answer=None)]
    answers = [
        Answer("a", 0, "A", 0, True, seconds=9999.0),
        Answer("b", 0, "hm", None, False, seconds=100.0),
        Answer("c", 0, correct=False, error="c.mp4: it is empty"),
        Answer("d", 0, "B", 1),
    ]
    summary = summarize(questions, answers)
    assert summary["questions"] == 4 and summary["videos"] == 4
    assert (summary["score"]["right"], summary["score"]["total"]) == (1, 3)
    assert {name: (row["right"], row["total"]) for name, row in summary["by_category"].items()} == {
        "x": (1, 2), "y": (0, 1),
    }  # fmt: skip
    assert list(summary["by_duration"]) == ["under 1 min", "1 to 3 min", "not known"]
    assert summary["unusable"] == {"c.mp4: it is empty": 1} and summary["undecided"] == 1
    assert summary["letters"] == {"A": 1, "B": 1}


def test_two_runs_compared():
    first = {f"q{n}": n < 6 for n in range(10)} | {"only": True}
    second = {f"q{n}": n in (0, 1, 2, 3, 6, 7, 8, 9) for n in range(10)}
    found = compare(first, second)
    assert (found.both, found.neither, found.lost) == (4, 0, ["q4", "q5"])
    assert found.gained == ["q6", "q7", "q8", "q9"] and found.difference == pytest.approx(0.2)
    assert found.p_value == pytest.approx(0.6875)  # scipy.stats.binomtest(2, 6).pvalue
    # by hand: (4.5 - 2.5) / 12, and 1.96 times the root of (7 - 2 ** 2 / 12) / 12
    assert found.interval == (pytest.approx(-0.2550, abs=1e-4), pytest.approx(0.5884, abs=1e-4))
    same = compare(first, first)
    assert same.p_value == 1 and same.interval[0] < 0 < same.interval[1]
    better = compare(dict.fromkeys(first, False), dict.fromkeys(first, True))
    assert 0 < better.interval[0] < better.interval[1] <= 1
    with pytest.raises(ValueError, match="no question in common"):
        compare(first, {"other": True})
