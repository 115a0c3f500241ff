"""Bodies of requests as what is asked: a conversation, the media in it, and how to answer; nothing else is let through.

What is unusual: whatever is given and would not be heeded is refused by name, but for what says nothing about the
answer (`IGNORED`) and values that ask for what is done anyway (`NEUTRAL`).
"""

from dataclasses import dataclass, field
from typing import Any

from vamba.errors import UserError


MIN_FPS, MAX_FPS = 1e-6, 1000
MAX_TEXT = 2**20  # characters of a conversation
MAX_STOPS, LONGEST_STOP = 4, 100  # how many, characters
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
NEUTRAL: dict[str, list] = {
    "background": [False],
    "functions": [[]],
    "include": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "modalities": [["text"]],
    "n": [1],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "text": [{}, {"format": {"type": "text"}}],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "truncation": ["disabled"],
}
COMMON = {"model", "stream", "temperature", "top_p", "seed", "mm_processor_kwargs"}
CHAT = COMMON | {"messages", "stream_options", "max_tokens", "max_completion_tokens", "frequency_penalty", "stop"}
RESPONSE = COMMON | {"input", "instructions", "max_output_tokens"}
# How a message may say a text, and a medium.
TEXTS = ("text", "input_text", "output_text")
MEDIA = {"image_url": "image", "input_image": "image", "video_url": "video", "input_video": "video"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass
class Asked:
    """What a request asks.

    Attributes:
        turns: messages as a chat template takes them; the content of each is a list of texts and of `{"type": kind}`.
        media: kind and name of each medium in `turns`, in order. reading: options of `watch`.
        generation: fields of a GenerationConfig. seed: of what is drawn. stops: texts before which an answer ends.
    """

    turns: list[dict]
    media: list[tuple[str, str]]
    generation: dict[str, Any] = field(default_factory=dict)
    reading: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stops: list[str] = field(default_factory=list)


def asked_by(body: dict, *, is_chat: bool, max_tokens: int, max_media: int, max_frames: int) -> Asked:
    """A body of `/v1/chat/completions`, or of `/v1/responses`.

    Args:
        max_tokens: of an answer. max_media: in a conversation. max_frames: of a video.

    Raises:
        UserError: it asks for what is not done here, or something in it is of the wrong kind or too much.
    """
    body = {name: value for name, value in body.items() if value is not None}
    known = CHAT if is_chat else RESPONSE
    for name in sorted(body.keys() - known - IGNORED):
        if not any(type(body[name]) is type(same) and body[name] == same for same in NEUTRAL.get(name, [])):
            raise UserError(
                f"{name!r:.60} is not supported by this server, or not as {body[name]!r:.60}; leave it out."
            )
    if not isinstance(body.get("stream", False), bool):
        raise UserError(f"stream is {body['stream']!r:.60}; give true or false.")
    turns, media = _conversation(body["messages"] if "messages" in body else _turns_of_input(body))
    if len(media) > max_media:
        raise UserError(f"The conversation has {len(media)} videos and images, and {max_media} are allowed.")
    generation: dict[str, Any] = {}
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if (number := _number(body, name, 1, max_tokens, whole=True)) is not None:
            generation["max_new_tokens"] = number
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    if temperature is not None:
        generation |= {"do_sample": temperature > 0, "temperature": float(temperature) or 1.0}
    if top_p is not None:
        generation["top_p"] = max(float(top_p), 1e-6)
    if (penalty := _number(body, "frequency_penalty", 0, 2)) is not None:
        generation["repetition_penalty"] = 1.0 + float(penalty)  # as transformers' server has it
    _check_stream_options(body.get("stream_options", {}))
    seed = _number(body, "seed", -(2**63), 2**63 - 1, whole=True)
    reading, stops = _reading(body.get("mm_processor_kwargs", {}), max_frames), _stops(body.get("stop", []))
    return Asked(turns, media, generation, reading, seed, stops)


def _number(body: dict, name: str, low: float, high: float, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return None
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {value!r:.60}; give {what} from {low} to {high}.")
    return value


def _stops(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    ):
        raise UserError(f"stop is {given!r:.60}; give a text of up to {LONGEST_STOP} characters, or {MAX_STOPS} such.")
    for stop in stops:
        _check_text(stop)
    return stops


def _check_stream_options(given: Any) -> None:
    include_usage = given.get("include_usage", False) if isinstance(given, dict) else None
    if not isinstance(include_usage, bool | None) or not isinstance(given, dict):
        raise UserError(f"stream_options is {given!r:.60}; give an object with include_usage, true or false.")


def _reading(given: Any, max_frames: int) -> dict[str, Any]:
    """How videos are sampled."""
    if not isinstance(given, dict) or given.keys() - {"fps", "num_frames"} or len(given) > 1:
        raise UserError(f"mm_processor_kwargs is {given!r:.80}; give an object with fps or num_frames.")
    asked = {
        "fps": _number(given, "fps", MIN_FPS, MAX_FPS),
        "num_frames": _number(given, "num_frames", 1, max_frames, True),
    }
    return {name: value for name, value in asked.items() if value is not None}


def _turns_of_input(body: dict) -> Any:
    """The `input` and `instructions` of a response as messages."""
    given, instructions = body.get("input"), body.get("instructions")
    turns: Any = given
    if isinstance(given, str):
        turns = [{"role": "user", "content": given}]
    elif isinstance(given, list) and given and all(isinstance(one, dict) and "role" not in one for one in given):
        turns = [{"role": "user", "content": given}]
    if instructions is not None and isinstance(turns, list):
        turns = [{"role": "system", "content": instructions}, *turns]
    return turns


def _conversation(messages: Any) -> tuple[list[dict], list[tuple[str, str]]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"The conversation is {messages!r:.60}; give a list of turns, each with a role and a content.")
    turns, media, characters = [], [], 0
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(role, str) or role not in ROLES or not isinstance(blocks, list) or not blocks:
            raise UserError(
                f"A turn is {message!r:.80}; give a role (system, user, assistant) and a content: a text, or a list of "
                "texts, images and videos."
            )
        items: list[dict] = []
        for block in blocks:
            kind, value = _block(block)
            if kind == "text":
                characters += len(value)
                items.append({"type": "text", "text": value})
            elif role != "user":
                raise UserError(f"A turn of the {role} holds {kind}; put images and videos into turns of the user.")
            else:
                media.append((kind, value))
                items.append({"type": kind})
        turns.append({"role": ROLES[role], "content": items})
    if turns[-1]["role"] != "user":
        raise UserError("The conversation does not end with a turn of the user; give a question to answer.")
    if not any(item["type"] != "text" or item["text"].strip() for item in turns[-1]["content"]):
        raise UserError("The last turn says nothing; give a question to answer.")
    if characters > MAX_TEXT:
        raise UserError(f"The conversation has {characters} characters, and {MAX_TEXT} are allowed.")
    return turns, media


def _block(block: Any) -> tuple[str, str]:
    """What a block is, and its text or the name of its medium."""
    told = block.get("type") if isinstance(block, dict) else None
    if isinstance(told, str) and told in TEXTS and isinstance(text := block.get("text"), str):
        _check_text(text)
        return "text", text
    if isinstance(told, str) and told in MEDIA:
        kind = MEDIA[told]
        url = block.get(f"{kind}_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            _check_text(url[:1000])
            return kind, url
    raise UserError(
        f'A block is {block!r:.80}; give {{"type": "text", "text": …}}, or image_url or video_url with a url.'
    )


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"A text is not UTF-8 at character {error.start}; give one that is.") from error
