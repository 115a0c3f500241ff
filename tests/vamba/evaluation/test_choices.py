"""What a reply means: the formats that LVBench, Video-MME, MLVU and LongVideoBench ask for, and what models say."""

import pytest

from vamba.evaluation.choices import is_right, parse_choice, rotations, strip_letters


COLOURS = ("Red", "Blue", "Green", "Yellow")
FIVE = (*COLOURS, "White")
THINGS = ("A blue car", "A book", "The table")
A, B, C, D, E = range(5)


@pytest.mark.parametrize(
    "reply",
    [
        # a bare letter, as Video-MME, LVBench and LongVideoBench ask for it
        "B", " B ", "B\n", "b", "B.", "b.", "B)", "(B)", "(b)", "(B", "B:", "B,", "**B**", "\\boxed{B}", "[B]", "'B'",
        # with its text, as the options are written in LVBench "(B) Blue" and Video-MME "B. Blue"
        "B. Blue", "B: Blue", "(B) Blue", "B) Blue", "B) Blue (the second one)", "B. Blue\nC. Red", "B\nBecause it is.",
        "B - Blue", "**B. Blue**",
        # the text alone
        "Blue", "blue", "Blue.", "The answer is blue.", '"Blue"',
        # a sentence: MLVU's "Best option: (" and what it is taken for
        "The answer is B", "the answer is b", "The answer is B.", "The answer is (B).", "The best answer is: B",
        "The best answer is B", "The correct answer is (B) Blue.", "The best option is B", "The correct option is B",
        "Best option: (B)", "Best Option: (B", "Best option: B", "Best answer: B", "Answer: B", "answer: b",
        "Answer: **(B)**", "The option is B.", "Option B", "Option B is correct.", "I choose B", "I think it is B",
        "<answer>B</answer>", "Because of the blue sky, B.", "ANSWER: B", "Answer (B)", "My final answer: B",
        # other than B is named, but not meant
        "The answer is B, not A.", "It is not A, it is B.", "A is wrong, so the answer is B.",
        "The answer is B. Option A is wrong because nothing is red.", "Option B is right, option A is wrong",
        "The correct answer is B because option C shows a green car.", "B is correct, not option A",
        "B, because A is wrong", "At first I thought that the answer is A, but the answer is B.",
        "选B", "答案是B", "答案是 (B)。",
    ],
)  # fmt: skip
def test_the_second_option_is_meant(reply):
    assert parse_choice(reply, COLOURS) == B


@pytest.mark.parametrize(
    ("reply", "options", "choice"),
    [
        ("My answer is C.", COLOURS, C),
        ("A is wrong, so the answer is C.", COLOURS, C),
        ("Based on the video, the man picks up a cup, so the answer is C.", COLOURS, C),
        ("A", COLOURS, A),
        ("A. Red", COLOURS, A),
        ("a", COLOURS, A),
        ("E", FIVE, E),  # LongVideoBench, NExT-QA and HourVideo have five
        ("E.", FIVE, E),
        ("(E)", FIVE, E),
        ("The options are A. Red, B. Blue. I would choose C.", COLOURS, C),
        ("The answer is A because it is red.", COLOURS, A),
        ("The answer is a.", COLOURS, A),
        ("The answer is a dog.", ("cat", "dog", "bird"), B),
        ("Answer: a dog", ("cat", "dog", "bird"), B),
        ("The answer is a dog.", ("A cat", "A dog", "A bird"), B),
        ("It is not red, it is blue.", COLOURS, B),
        ("No, he does not.", ("Yes", "No"), B),
        ("C++", ("C++", "C"), A),
        ("C", ("C++", "C"), B),
        # options that begin with an article, which the official parsers take for the letter A
        ("A blue car", THINGS, A),
        ("A book", THINGS, B),
        ("B. A book", THINGS, B),
        ("A book lies on it", THINGS, B),
        ("The table", THINGS, C),
        ("the table.", THINGS, C),
        ("It is the table", THINGS, C),
        # options that are letters or numbers
        ("A", ("B", "A"), B),
        ("2", ("1", "2", "3", "4"), B),
        ("B. 2", ("1", "2", "3", "4"), B),
        ("B. 1", ("1", "2", "3", "4"), B),
        ("12", ("1", "2", "12"), C),
        ("1.5", ("1", "1.5", "15"), B),
        # an option within another
        ("red car", ("red", "red car"), B),
        ("It was a red car", ("red", "red car"), B),
        ("between the flashes", ("before the flashes", "between the flashes"), B),
    ],
)
def test_the_choice_that_is_meant(reply, options, choice):
    assert parse_choice(reply, options) == choice


@pytest.mark.parametrize(
    ("reply", "options"),
    [
        ("", COLOURS),
        (" ", COLOURS),
        ("I don't know", COLOURS),
        ("None of the above", COLOURS),
        ("F", COLOURS),
        ("E", COLOURS),
        ("(E)", COLOURS),
        ("The answer is E.", COLOURS),
        ("D. A book", THINGS),
        ("A or B", COLOURS),
        ("A and B", COLOURS),
        ("A, B", COLOURS),
        ("A, B and C", COLOURS),
        ("(A) or (B)", COLOURS),
        ("**A** or **B**", COLOURS),
        ("A;B", COLOURS),
        ("A, or B", COLOURS),
        ("The answer is A and B", COLOURS),
        ("The answer is C or D", COLOURS),
        ("Neither A nor B", COLOURS),
        ("Option B is not correct", COLOURS),
        ("Option A or option B", COLOURS),
        ("It is not red.", COLOURS),
        ("I have no idea", ("Yes", "No")),
        ("There is no way to tell", ("Yes", "No")),
        ("The answer is not B", COLOURS),
        ("Red or blue", COLOURS),
        ("A man in a coat", COLOURS),
        ("I see a man", FIVE),
        ("It is a good answer", COLOURS),
        ("The man walks to the door and then he opens the window to look outside", COLOURS),
        ("reddish", COLOURS),
        ("7", COLOURS),
    ],
)
def test_nothing_is_guessed(reply, options):
    assert parse_choice(reply, options) is None


def test_without_letters_only_texts_count():
    assert parse_choice("B", COLOURS, lettered=False) is None
    assert parse_choice("The answer is B", COLOURS, lettered=False) is None
    assert parse_choice("blue.", COLOURS, lettered=False) == B


def test_every_rotation_holds_every_option_at_every_place():
    orders = rotations(4)
    assert orders[0] == [0, 1, 2, 3]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert all(sorted(order[place] for order in orders) == [0, 1, 2, 3] for place in range(4))


def test_letters_that_a_file_writes_before_its_options():
    assert strip_letters(["A. red", "B. blue"]) == ["red", "blue"]
    assert strip_letters(["(A) red", "(B) blue"]) == ["red", "blue"]
    assert strip_letters(["A. red", "blue"]) == ["A. red", "blue"]
    assert strip_letters(["A red car", "B movie"]) == ["A red car", "B movie"]
    assert strip_letters(["B. red", "A. blue"]) == ["B. red", "A. blue"]


def test_an_open_answer_is_compared_without_case_punctuation_and_articles():
    assert is_right("The  red Car.", "a red car") and is_right("2", ("two", "2"))
    assert not is_right("the red bus", "a red car") and not is_right("", "a red car")
