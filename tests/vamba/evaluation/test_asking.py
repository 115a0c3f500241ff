"""The engine asks what a `VideoChat` would be asked, and encodes each video once."""

from collections import Counter

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from vamba import VideoChat
from vamba.evaluation import PROTOCOLS, Protocol, answer_questions, read_questions


class CountingChat(VideoChat):
    """Counts how often it watches what."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.watched = Counter()

    def watch(self, video, **options):
        self.watched[video] += 1
        return super().watch(video, **options)


@pytest.fixture(scope="module", params=["checkpoint", "ma2mba"])
def chat(request):
    folder = request.getfixturevalue(request.param)
    return CountingChat(
        AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    )


@pytest.fixture(autouse=True)
def _from_zero(chat):
    chat.watched.clear()


def ask(chat, questions, protocol="letters", **options):
    return list(answer_questions(chat, questions, PROTOCOLS[protocol], progress=False, do_sample=False, **options))


def test_answers_are_those_of_a_chat_and_each_video_is_encoded_once(chat, asked):
    questions = read_questions(asked)
    answers = {answer.id: answer for answer in ask(chat, questions, max_new_tokens=4)}
    videos = [question.videos[0] for question in questions]
    assert chat.watched == dict.fromkeys(videos, 1) | {videos[0]: 2}  # its first second is another thing to watch
    for question in questions:
        answer = answers[question.id]
        if question.id == "broken":
            assert answer.correct is False and "broken.mp4" in answer.error and answer.choice is None
            continue
        chat.watch(question.videos[0], progress=False, end=question.end)
        lines = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", question.options))
        ending = "\nAnswer with the option's letter from the given choices directly." if question.options else ""
        assert answer.reply == chat.ask(question.text + lines + ending, max_new_tokens=4, do_sample=False)
        assert (answer.correct is None) == (question.id == "unknown")
        assert answer.seconds == pytest.approx(1 if question.end else 2)


@pytest.mark.parametrize("protocol", ["letters", "plain"])
def test_by_likelihood_the_likeliest_candidate_is_chosen(chat, asked, protocol):
    question = read_questions(asked)[0]
    (answer,) = ask(chat, [question], protocol, likelihood=True)
    chat.watch(question.videos[0], progress=False)
    prompt = PROTOCOLS[protocol].prompt(question, range(4))
    candidates = "ABCD" if protocol == "letters" else question.options
    # the texts of options may begin with one another
    expected = [found.total for found in chat.log_likelihoods(prompt, candidates, ended=protocol == "plain")]
    assert answer.log_likelihoods == pytest.approx(expected)
    assert answer.choice == expected.index(max(expected)) and answer.correct == (answer.choice == question.answer)


def test_circular_asks_every_rotation_about_one_encoding(chat, asked):
    question = read_questions(asked)[3]
    answers = ask(chat, [question], circular=True, likelihood=True)
    assert [answer.rotation for answer in answers] == [0, 1, 2, 3] and sum(chat.watched.values()) == 1
    chat.watch(question.videos[0], progress=False)
    for answer in answers:
        shown = [question.options[(place + answer.rotation) % 4] for place in range(4)]
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", shown))
        prompt = f"{question.text}\n{lines}\nAnswer with the option's letter from the given choices directly."
        scores = [found.total for found in chat.log_likelihoods(prompt, "ABCD")]
        assert question.options[answer.choice] == shown[scores.index(max(scores))]
        assert answer.reply == "ABCD"[scores.index(max(scores))]


def test_bounds_of_the_number_of_frames(chat, asked):
    """As recipes and model arguments of lmms-eval give them."""
    question = read_questions(asked)[0]
    for reading, frames in (({"fps": 8.0, "max_frames": 4}, 4), ({"fps": 1.0, "min_frames": 6}, 6)):
        (answer,) = answer_questions(chat, [question], Protocol("bounded", "", reading), progress=False)
        assert answer.error is None
        chat.watch(question.videos[0], progress=False, **reading)
        bounded = chat.memory.num_video_tokens
        chat.watch(question.videos[0], progress=False, num_frames=frames)
        assert bounded == chat.memory.num_video_tokens


def test_what_is_answered_is_neither_watched_nor_asked(chat, asked):
    questions = read_questions(asked)
    answered = {(question.id, 0) for question in questions if question.id != "place2"}
    assert [answer.id for answer in ask(chat, questions, answered=answered, max_new_tokens=2)] == ["place2"]
    assert len(chat.watched) == 1


def test_a_question_that_cannot_be_asked_costs_itself_only(chat, asked):
    questions = read_questions(asked)[:2]
    endless = Protocol("endless", "", choice_prompt="{question} " + 5000 * "x ")
    answers = list(answer_questions(chat, questions, endless, progress=False, max_new_tokens=2))
    if chat.model.config.model_type == "vamba":  # which has positions for so many tokens only
        assert all("ask a shorter one" in answer.error and answer.correct is False for answer in answers)
    assert [answer.id for answer in answers] == ["colour0", "place0"]
