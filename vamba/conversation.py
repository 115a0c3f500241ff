"""Turns of a conversation: what may be one, and where media stand in the prompt that is made of them.

What is unusual: media that were watched stand first in the first turn of the user, whenever they were watched, as a
model is trained so and a state (Video-Ma2mba) has read them before any text. For the same reason a system prompt goes
to a state within that turn, after the media.
"""

from collections.abc import Sequence
from typing import Any

from .errors import UserError


MAX_QUESTION = 2**20  # characters
ROLES = ("system", "user", "assistant")


def conversation_of(question: str | Sequence[dict]) -> list[dict]:
    """A question, or turns of a conversation, as messages of text that a chat template takes.

    Raises:
        UserError: it is neither, nobody asks anything in it, or it holds images or videos, which are to be watched.
    """
    if not isinstance(question, (list, tuple)):
        check_question(question)
        question = [{"role": "user", "content": question}]
    messages: list[dict] = []
    for turn in question:
        role, content = (turn.get(name) for name in ("role", "content")) if isinstance(turn, dict) else (None, None)
        blocks: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        is_text = isinstance(blocks, list) and all(isinstance(b, dict) and b.get("type") == "text" for b in blocks)
        is_text = is_text and (role != "user" or len(blocks) > 0)
        if role not in ROLES or not is_text:
            raise UserError(
                f"A turn is {turn!r:.80}; give a role (system, user, assistant) and a content of text, and let videos "
                "be watched first."
            )
        for block in blocks:
            if role == "user" or block.get("text") != "":  # an answer may be empty
                check_question(block.get("text"))
        messages.append({"role": role, "content": blocks})
    if not messages or messages[-1]["role"] != "user":
        raise UserError("The conversation does not end with a turn of the user; give a question to answer.")
    return messages


def check_question(question: Any) -> None:
    """Raises UserError unless the question is a text that can be asked."""
    if not isinstance(question, str):
        raise UserError(f"The question is {question!r:.80}; give a text.")
    if not question.strip() or len(question) > MAX_QUESTION:
        raise UserError(f"The question has {len(question)} characters; give from 1 to {MAX_QUESTION}, not spaces only.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The question is not UTF-8 at character {error.start}; give a text that is.") from error


def with_media(messages: list[dict], kinds: Sequence[str], *, after_media: bool) -> list[dict]:
    """The messages with one block for each medium ("image" or "video") before the first words of the user.

    Args:
        after_media: the model has read the media before any text, so that a system prompt comes after them.

    Raises:
        UserError: with `after_media`, the assistant speaks first.
    """
    system = messages[0]["content"] if after_media and messages[0]["role"] == "system" else []
    messages = messages[1:] if system else messages
    if after_media and messages[0]["role"] != "user":
        raise UserError(
            f"The conversation begins with a turn of the {messages[0]['role']}; this model has read the video before "
            "any turn: let the user's come first, with what the other says."
        )
    first = next(turn for turn in messages if turn["role"] == "user")
    system = [block | {"text": block["text"] + "\n\n"} for block in system]
    content = [*({"type": kind} for kind in kinds), *system, *first["content"]]
    return [turn | {"content": content} if turn is first else turn for turn in messages]
