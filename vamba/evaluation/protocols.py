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
        open_prompt: with {question}, where there are no options.
        max_new_tokens, max_open_tokens: of an answer with options, and without.
    """

    name: str
    source: str
    reading: Mapping[str, Any] = field(default_factory=dict)
    choice_prompt: str = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
    option: str = "{letter}. {option}"
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
        return self.choice_prompt.format(question=question.text, options="\n".join(lines))

    def candidates(self, question: Question, order: Sequence[int]) -> list[str]:
        """What multiple choice by likelihood compares: the letters where the options are shown, else their texts."""
        return letters(len(order)) if self.shows_options else [question.options[index] for index in order]

    def tokens(self, question: Question) -> int:
        return self.max_new_tokens if question.options else self.max_open_tokens


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("letters", "the prompt of LLaVA and lmms-eval"),
        Protocol("plain", "the question alone; a reply is compared with the options", choice_prompt="{question}"),
    )
}
