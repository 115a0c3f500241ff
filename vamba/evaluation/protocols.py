"""How a benchmark asks: what is watched of a video, how a question becomes a prompt, how long the answer may be.

A protocol is a row of `PROTOCOLS`; its values can be overridden one by one (`dataclasses.replace`, options of `vamba
eval`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .choices import letters
from .questions import Question


@dataclass(frozen=True)
class Protocol:
    """A way to ask.

    Attributes:
        name: of the preset. source: where its values come from.
        reading: options of `VideoChat.watch`; empty for what the checkpoint was trained with.
        choice_prompt: with {question} and {options}; without {options} the options are not shown, and a reply is
            compared with their texts.
        option: with {letter} and {option}, one line of {options}.
        between: what stands between two of {options}.
        open_prompt: with {question}, where there are no options.
        max_new_tokens, max_open_tokens: of an answer with options, and without.
    """

    name: str
    source: str
    reading: Mapping[str, Any] = field(default_factory=dict)
    choice_prompt: str = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
    option: str = "{letter}. {option}"
    between: str = "\n"
    open_prompt: str = "{question}"
    max_new_tokens: int = 16
    max_open_tokens: int = 256

    @property
    def shows_options(self) -> bool:
        return "{options}" in self.choice_prompt

    def prompt(self, question: Question, order: Sequence[int]) -> str:
        """The text that is asked, the options in this order."""
        if not question.options:
            return self.open_prompt.format(question=question.text)
        lines = [
            self.option.format(letter=letter, option=question.options[index])
            for letter, index in zip(letters(len(order)), order)
        ]
        return self.choice_prompt.format(question=question.text, options=self.between.join(lines))

    def reading_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its options of `VideoChat.watch` where those given say nothing; of fps and num_frames only one holds."""
        sampled = {"fps", "num_frames"} if given.keys() & {"fps", "num_frames"} else set()
        return {name: value for name, value in self.reading.items() if name not in sampled} | dict(given)

    def candidates(self, question: Question, order: Sequence[int]) -> list[str]:
        """What multiple choice by likelihood compares: the letters where the options are shown, else their texts."""
        return letters(len(order)) if self.shows_options else [question.options[index] for index in order]

    def tokens(self, question: Question) -> int:
        return self.max_new_tokens if question.options else self.max_open_tokens


_ASK = "Select the best answer to the following multiple-choice question based on the video."
_FOUR, _FIVE = "(A, B, C, or D)", "(A, B, C, D, or E)"


def _vamba(benchmark: str, where: str, num_frames: int = 512, max_side: int = 480, **prompts: Any) -> Protocol:
    """As the scripts of Vamba's repository ask: middles of equal parts, sides of 256 pixels at least, 512 tokens."""
    reading = {"num_frames": num_frames, "centered": True, "min_side": 256, "max_side": max_side}
    reading |= {"min_pixels": 56 * 56, "max_pixels": 12845056}  # of Qwen2-VL's processor
    source = f"defaults of the scripts of TIGER-AI-Lab/Vamba: {where}"
    return Protocol(f"vamba-{benchmark}", source, reading, **prompts, max_new_tokens=512, max_open_tokens=512)


def _select(joint: str = " ", letters: str = _FOUR) -> str:
    return f"{_ASK}{joint}Respond with only the letter {letters} of the correct option.\n{{question}}\n{{options}}"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("letters", "the prompt of LLaVA and lmms-eval"),
        Protocol("plain", "the question alone; a reply is compared with the options", choice_prompt="{question}"),
        _vamba("lvbench", "eval/eval_lvbench.py", 1024, 560, choice_prompt=_select("\n"), option="({letter}) {option}"),
        _vamba(
            "hourvideo",
            "eval/eval_hourvideo.py, which draws its answers (do_sample, top_p 0.9); here they are greedy",
            128,
            360,
            choice_prompt=f"{_ASK}\n{{question}}\n{{options}}\n"
            f"Respond with only the letter {_FIVE} of the correct option.",
        ),
        _vamba("videomme", "eval/eval_videomme.py", choice_prompt=_select("\n"), between=" "),
        _vamba("mlvu", "eval/eval_mlvu.py", choice_prompt=_select()),
        _vamba("longvideobench", "eval/eval_longvideobench.py", choice_prompt=_select()),
        _vamba("nextqa", "eval/eval_nextqa.py, but 512 / 480 resized", choice_prompt=_select(letters=_FIVE)),
        _vamba(
            "mvbench",
            "eval/eval_mvbench.py",
            choice_prompt="Question: {question}\n{options}\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        _vamba("dream1k", "none for DREAM-1K; bytedance/tarsier's prompt", open_prompt="Describe the video in detail."),
        Protocol(
            "video-ma2mba",
            "1 FPS as in the paper, arXiv 2411.19460; no code for evaluation was published, the prompt is lmms-eval's",
            {"fps": 1.0},
        ),
    )
}
