"""Options and their letters: how they are written into a prompt, and which of them an answer means.

What is unusual: an answer that names no option, or two, is None and counts as wrong; nothing is guessed. The official
scripts of some benchmarks draw a random letter then (LongVideoBench) or take the first letter A to E wherever it stands
(Video-MME, MLVU), which finds an `A` in "A man runs".
"""

import re
import string
import unicodedata
from collections.abc import Sequence


LETTERS = string.ascii_uppercase
# "the best answer is: (B", "Answer: B", "option B", and the last of several counts, as a conclusion comes at the end
_DECLARED = re.compile(
    r"(?:answer|option|choice)s?(?:\s+(?:would\s+be|should\s+be|is|are|to\s+the\s+question\s+is))?\s*[:=]?\s*"
    r"(?:(?:option|choice|letter)\s+)?[\"'(\[{*_<\s]*\b([A-Za-z])\b(?!['’])",
    re.IGNORECASE,
)
_LEADING = re.compile(r"^[\"'(\[{*_<\s]*([A-Za-z])(?:[\"')\]}*_>.:,;]|\s*[-–—]\s|\s*\n|\s*$)")
_ALONE = re.compile(r"(?<![A-Za-z0-9'’])\(?([A-Z])\)?(?![A-Za-z0-9'’])")
_DENIED = re.compile(r"\bnot\s+(?:option\s+)?\(?[A-Z]\b\)?")


def letters(count: int) -> list[str]:
    """The first `count` letters."""
    return list(LETTERS[:count])


def strip_letters(options: list[str]) -> list[str]:
    """Options without the letters that some files write before them, `A. red` or `(A) red`, if each has its own."""
    matches = [re.match(rf"\(?{letter}[.:)]\s*(?=\S)", text) for letter, text in zip(LETTERS, options)]
    return [text[match.end() :] for match, text in zip(matches, options) if match] if all(matches) else options


def rotations(count: int) -> list[list[int]]:
    """The orders of circular scoring: `rotations(n)[r][i]` is the option that stands at place i in order r."""
    return [[(place + shift) % count for place in range(count)] for shift in range(count)]


def parse_choice(reply: str, options: Sequence[str], lettered: bool = True) -> int | None:
    """The index of the option that a reply means, by its letter or its text; None if it means none, or several.

    Args:
        options: their texts, in the order in which they were shown.
        lettered: whether they were shown with letters, without which a letter means nothing.
    """
    reply = reply.strip()
    known = {letter: index for index, letter in enumerate(letters(len(options) if lettered else 0))}
    said = _plain(reply)
    for index, option in enumerate(options):
        if said and said == _plain(option):
            return index
    if lettered and (match := _LEADING.match(reply)):
        return known.get(match[1].upper())
    declared = [letter for letter in _DECLARED.findall(reply) if letter.isupper() or len(reply) < 40]
    if lettered and declared:
        return known.get(declared[-1].upper())
    named = [index for index, option in enumerate(options) if _contains(said, _plain(option))]
    longest = [i for i in named if not any(i != j and _contains(_plain(options[j]), _plain(options[i])) for j in named)]
    if len(longest) == 1:
        return longest[0]
    reply = _DENIED.sub("", reply)
    alone = {letter for letter in _ALONE.findall(reply) if letter in known and not _is_word(letter, reply)}
    return known[alone.pop()] if len(alone) == 1 and not longest else None


def is_right(reply: str, answer: str | tuple[str, ...]) -> bool:
    """Whether a reply to an open question is (one of) the expected answers: case, punctuation, articles and spaces do
    not count."""
    expected = (answer,) if isinstance(answer, str) else answer
    return _normal(reply) in {_normal(text) for text in expected}


def _plain(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s.%-]|[.](?!\d)", " ", words).split())


def _normal(text: str) -> str:
    words = [word for word in _plain(text).split() if word not in ("a", "an", "the")]
    return " ".join(words) or text.strip()


def _contains(text: str, part: str) -> bool:
    return bool(part) and f" {part} " in f" {text} "


def _is_word(letter: str, reply: str) -> bool:
    """Whether a single capital is a word of the language, the article or "I", and not one of "A or B"."""
    return letter in "AI" and re.search(rf"(?<![\w'’(]){letter}\s+(?!(?:or|and)\s+\(?[A-Z]\b)[a-z]", reply) is not None
