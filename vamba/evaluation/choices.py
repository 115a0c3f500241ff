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
_LETTER = r"[\"'(\[{*_<\s]*\b([A-Za-z])\b(?!['’])"
# "the best answer is: (B", "Answer: B", "the correct option is B"; the last counts, as a conclusion comes at the end
_CONCLUDED = re.compile(
    rf"(?:answer|option|choice)(?:\s+(?:would\s+be|should\s+be|is|to\s+the\s+question\s+is)\s*[:=]?|\s*[:=])\s*"
    rf"(?:(?:option|choice|letter)\s+)?{_LETTER}",
    re.IGNORECASE,
)
# "Option B", "Answer (B)", "I choose B"
_NAMED = re.compile(rf"(?:answer|option|choice|choose|pick|select)\s+{_LETTER}", re.IGNORECASE)
_LEADING = re.compile(r"^[\"'(\[{*_<\s]*([A-Za-z])(?:[\"')\]}*_>.:,;]|\s*[-–—]\s|\s*\n|\s*$)")
_ALONE = re.compile(r"(?<![A-Za-z0-9'’])\(?([A-Z])\)?(?![A-Za-z0-9'’])")
_DENIED = re.compile(
    r"\b(?i:not|neither|nor)\s+(?i:option\s+|choice\s+)?\(?[A-Z]\b\)?"
    r"|\b(?i:option\s+|choice\s+)?\(?[A-Z]\b\)?\s+(?:is|was)\s+(?:not|wrong|false|incorrect)\b"
)
# what may follow a letter; before another word in small letters, "A" is the article and "I" is someone
_AFTER_A_LETTER = r"(?:or|and|nor|because|since|as|for|is|not|but|in|with|from|based|which|that)\b"
_ANOTHER = rf"[\"'(\[*_]*[A-Z]\b(?!['’])(?!\s+(?!{_AFTER_A_LETTER})[a-z])"
_AND_ANOTHER = re.compile(rf"^[\s)\]*_.\"']*(?:(?:[,;/&]|\b(?:or|and|nor)\b)\s*)+{_ANOTHER}")
_SENTENCES = {"yes", "no", "true", "false", "none", "all", "both"}  # options that are words of any sentence


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
    for alike in (str.casefold, _plain):
        same = [index for index, option in enumerate(options) if alike(reply) and alike(reply) == alike(option)]
        if len(same) == 1:
            return same[0]
    if lettered and (found := _letter(reply)) is not None:
        return LETTERS.index(found) if found in letters(len(options)) else None
    return _named(_plain(reply), [_plain(option) for option in options], reply if lettered else "")


def _letter(reply: str) -> str | None:
    """The letter that a reply leads with, or that it concludes with; "" if it says two, None if it says none."""
    if match := _LEADING.match(reply):
        return _unless_another(match, reply)
    reply = _DENIED.sub("", reply)
    for pattern in (_CONCLUDED, _NAMED):
        matches = [match for match in pattern.finditer(reply) if _is_letter(match[1], reply[match.end(1) :])]
        if pattern is _NAMED and len({match[1].upper() for match in matches}) > 1:
            return ""
        if matches:
            return _unless_another(matches[-1], reply)
    return None


def _unless_another(match: re.Match, reply: str) -> str:
    return "" if _AND_ANOTHER.match(reply[match.end(1) :]) else match[1].upper()


def _is_letter(letter: str, rest: str) -> bool:
    """Whether a single letter that is followed by `rest` stands for an option, and is no word of the language."""
    if letter.islower():
        return not re.search(r"\w", rest)
    return letter not in "AI" or not re.match(rf"\s+(?!{_AFTER_A_LETTER})[a-z]", rest)


def _named(said: str, options: Sequence[str], lettered_reply: str) -> int | None:
    """The one option whose text, or else whose letter, stands somewhere in a reply."""
    for option in options:
        said = re.sub(rf"\b(?:not|never|no)\s+(?:an?\s+|the\s+)?{re.escape(option)}(?!\S)", " ", said)
    named = [index for index, option in enumerate(options) if _says(said, option)]
    longest = [i for i in named if not any(i != j and _contains(options[j], options[i]) for j in named)]
    if named:
        return longest[0] if len(longest) == 1 else None
    reply, known = _DENIED.sub("", lettered_reply), letters(len(options))
    alone = {m[1] for m in _ALONE.finditer(reply) if m[1] in known and _is_letter(m[1], reply[m.end(1) :].lstrip(")"))}
    return LETTERS.index(alone.pop()) if len(alone) == 1 else None


def _says(said: str, option: str) -> bool:
    return said.split(" ", 1)[0] == option if option in _SENTENCES else _contains(said, option)


def is_right(reply: str, answer: str | tuple[str, ...]) -> bool:
    """Whether a reply to an open question is (one of) the expected answers: case, punctuation, articles and spaces do
    not count."""
    expected = (answer,) if isinstance(answer, str) else answer
    return _normal(reply) in {_normal(text) for text in expected}


def _plain(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s.%+#-]|[.](?!\d)", " ", words).split())


def _normal(text: str) -> str:
    words = [word for word in _plain(text).split() if word not in ("a", "an", "the")]
    return " ".join(words) or text.strip()


def _contains(text: str, part: str) -> bool:
    return bool(part) and f" {part} " in f" {text} "
