"""Which of a conversation's tokens are to be learnt: what the assistant says, its end-of-turn token included.

What is unusual: the chat template itself says where a turn begins and ends. If it marks the assistant's words
({% generation %}), those marks count. Otherwise the turns are found by rendering the conversation turn by turn, and a
template that renders earlier turns differently once later ones follow is refused, as its labels could not be exact.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError
from transformers import ProcessorMixin

from vamba.errors import UserError, VideoReadError

from .conversations import ExampleError


_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Renders parts that were rendered before, marking those that the assistant speaks.
_SPOKEN_PARTS = (
    "{%- for part in parts -%}"
    "{%- if part[0] -%}{% generation %}{{ part[1] }}{% endgeneration %}{%- else -%}{{ part[1] }}{%- endif -%}"
    "{%- endfor -%}"
)


@contextmanager
def refusals() -> Iterator[None]:
    """Makes an ExampleError of a complaint of the template (about the order of the roles, say) or of the processor."""
    try:
        yield
    except TemplateError as error:
        raise ExampleError(f"the chat template refuses it: {error}") from error
    except (ExampleError, VideoReadError):
        raise
    except ValueError as error:
        raise ExampleError(f"the processor refuses it: {error}") from error


def template_options(processor: ProcessorMixin, messages: list[dict]) -> dict:
    """Keyword arguments with which `apply_chat_template` returns exact `assistant_masks` for `messages`.

    Raises:
        ExampleError: the template renders a turn differently once others follow. UserError: there is none.
    """
    template = processor.chat_template
    if isinstance(template, dict):  # several by name, of which transformers takes this one
        template = template.get("default")
    if template is None:
        raise UserError("The processor has no chat template (or none that is named default); set its chat_template.")
    if _MARKS.search(template):
        return {}
    return {"chat_template": _SPOKEN_PARTS, "parts": spoken_parts(processor, messages)}


@refusals()
def spoken_parts(processor: ProcessorMixin, messages: list[dict]) -> list[tuple[bool, str]]:
    """The rendered conversation in parts, (whether the assistant speaks, text)."""
    whole = processor.apply_chat_template(messages, tokenize=False)
    parts, done = [], 0
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        if index == 0:
            raise ExampleError("the assistant speaks first; put what it answers to, or a system turn, before")
        before = _prefix(processor, messages[:index], whole, add_generation_prompt=True)
        after = _prefix(processor, messages[: index + 1], whole, add_generation_prompt=False)
        end = len(before) + len(_without_trailer(whole[len(before) : len(after)], processor.tokenizer))
        parts += [(False, whole[done : len(before)]), (True, whole[len(before) : end])]
        done = end
    return [*parts, (False, whole[done:])]


def _prefix(processor: ProcessorMixin, messages: list[dict], whole: str, add_generation_prompt: bool) -> str:
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    if not whole.startswith(text):
        raise ExampleError(
            "the chat template renders a turn differently once others follow, so the assistant's words cannot be told "
            "apart; mark them in the template with {% generation %} and {% endgeneration %}"
        )
    return text


def _without_trailer(turn: str, tokenizer) -> str:
    """A turn up to its end token: the line break that follows in many templates is not the assistant's."""
    stripped = turn.rstrip()
    return stripped if stripped.endswith(tuple(tokenizer.all_special_tokens)) else turn
