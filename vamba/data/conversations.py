"""Training examples in the two formats people have, brought to one: chat messages as transformers takes them.

What is unusual: a mistake in an example is an `ExampleError` that says what is wrong with it; nothing is guessed,
except that LLaVA's files write `<image>` for a video too where an example has nothing but videos.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Any

from vamba.errors import UserError
from vamba.modeling.images import image_of_base64


ROLES = {"human": "user", "gpt": "assistant"} | {name: name for name in ("user", "assistant", "system", "tool")}
MEDIA_KINDS = ("video", "image")
_SOURCE_KEYS = ("{}", "bytes", "{}_url", "url", "path", "base64")  # of an image or a video, the first that is given
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", re.IGNORECASE)
_TAG = re.compile(r"<(video|image)>")


class ExampleError(UserError):
    """An example that cannot be trained on: one line that says why."""


def to_messages(example: Mapping[str, Any], media_root: str | os.PathLike | None = None) -> list[dict]:
    """The conversation of an example, as `processor.apply_chat_template` takes it.

    Args:
        example: with `messages`, each `{"role": ..., "content": text or list of items}`, an item being
            `{"type": "text", "text": ...}`, `{"type": "video", "video": path or {"path": ..., "start": ..., "end": ...,
            "fps": ...}, ...}` or the same with `image`; items without a source take the example's `videos` / `images`
            in order. A source is a path, a URL, bytes, an image's base64 text, `{"bytes": ..., "path": ...}` as
            `datasets` stores it, or what the processor takes besides; OpenAI's `image_url` items are understood. Or
            with `conversations` as LLaVA has them: `{"from": "human" | "gpt" | "system", "value": text with <video> and
            <image>}`, and `video` / `image`, one or a list.
        media_root: what relative paths are relative to.

    Raises:
        ExampleError: neither format, media and their marks differ in number, or no assistant turn with text.
    """
    for key in ("messages", "conversations"):
        turns = example.get(key) or []
        if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
            raise ExampleError(f"`{key}` is {turns!r:.60}; give a list of turns")
    if example.get("messages"):
        messages = [_message(turn) for turn in example["messages"]]
    elif example.get("conversations"):
        messages = [_llava_message(turn) for turn in example["conversations"]]
    else:
        raise ExampleError("it has neither `messages` nor `conversations`")
    _place_media(messages, example)
    for block in media_blocks(messages):
        _resolve(block, media_root)
    if not any(turn["role"] == "assistant" and _text(turn).strip() for turn in messages):
        raise ExampleError("no assistant turn says anything, so there is nothing to learn")
    return messages


def media_blocks(messages: list[dict]) -> list[dict]:
    """The image and video items of a conversation in order, to be changed in place."""
    return [block for turn in messages for block in turn["content"] if block["type"] in MEDIA_KINDS]


def _text(message: dict) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _message(turn: Mapping) -> dict:
    content = turn.get("content")
    if isinstance(content, str):
        return {"role": _role(turn.get("role")), "content": [{"type": "text", "text": content}]}
    if not isinstance(content, (list, tuple)) or not all(isinstance(block, Mapping) for block in content):
        raise ExampleError(f"the content of a message is {content!r:.60}; give a text or a list of items")
    return {"role": _role(turn.get("role")), "content": [_block(block) for block in content]}


def _block(block: Mapping) -> dict:
    block = {key: value for key, value in block.items() if value is not None}  # Arrow fills in what others have
    kind = block.get("type") or next((kind for kind in ("text", *MEDIA_KINDS) if kind in block), None)
    kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
    if kind not in ("text", *MEDIA_KINDS) or (kind == "text" and not isinstance(block.get("text"), str)):
        raise ExampleError(f"{str(block)[:80]} is no item of a message; types are text, video and image")
    return {**block, "type": kind}


def _llava_message(turn: Mapping) -> dict:
    role, value = _role(turn.get("from") or turn.get("role")), turn.get("value")
    if not isinstance(value, str):
        raise ExampleError(f"the value of a turn is {value!r:.60}; give a text")
    if role != "user":
        return {"role": role, "content": [{"type": "text", "text": value.strip()}]}
    content = []
    for index, part in enumerate(_TAG.split(value)):
        if index % 2:
            content.append({"type": part})
        elif part.strip():
            content.append({"type": "text", "text": part.strip()})
    return {"role": role, "content": content}


def _role(name: Any) -> str:
    if not isinstance(name, str) or name not in ROLES:
        raise ExampleError(f"a turn is spoken by {name!r:.60}; roles are {', '.join(ROLES)}")
    return ROLES[name]


def _place_media(messages: list[dict], example: Mapping) -> None:
    """Gives the items without a source the example's own `video(s)` and `image(s)`, in order."""
    given = {kind: _listed(example.get(kind)) or _listed(example.get(f"{kind}s")) for kind in MEDIA_KINDS}
    empty = [block for block in media_blocks(messages) if _take_source({**block})[0] is None]
    if given["video"] and not given["image"]:  # LLaVA-Video writes <image>
        for block in empty:
            block["type"] = "video"
    for kind in MEDIA_KINDS:
        blocks = [block for block in empty if block["type"] == kind]
        if len(blocks) != len(given[kind]):
            raise ExampleError(f"the text has room for {len(blocks)} {kind}s, {len(given[kind])} are given")
        for block, source in zip(blocks, given[kind]):
            block[kind] = source


def _listed(value: Any) -> list:
    if not _is_given(value):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value)


def _take_source(block: dict) -> tuple[str | None, Any]:
    """Removes all that names the source of a media item; the key that counts, and what was there."""
    taken = {key: block.pop(key.format(block["type"]), None) for key in _SOURCE_KEYS}
    return next(((key, source) for key, source in taken.items() if _is_given(source)), (None, None))


def _resolve(block: dict, media_root: str | os.PathLike | None) -> None:
    """Brings a media item to `{"type": kind, kind: source, options ...}` with the path under `media_root`."""
    kind = block["type"]
    key, source = _take_source(block)
    if isinstance(source, Mapping):
        inner = {"type": kind} | {name: value for name, value in source.items() if value is not None}
        key, found = _take_source(inner)
        if key is None:
            raise ExampleError(f"{str(source)[:80]} names no {kind}; give its path under {kind!r} or 'path'")
        source = found
        inner.pop("detail", None)  # which only OpenAI's models know
        block |= inner
    if not _is_given(source):
        raise ExampleError(f"an item of type {kind} has no source")
    if isinstance(source, (bool, int, float, Mapping)) or (kind == "image" and isinstance(source, (list, tuple))):
        raise ExampleError(f"{source!r:.60} is no {kind}; give its path")
    if key == "base64":
        try:
            source = base64.b64decode(source)
        except binascii.Error as error:
            raise ExampleError(f"the base64 text of a {kind} cannot be read: {error}") from error
    elif kind == "image" and isinstance(source, str):
        source = image_of_base64(source) or source
    block[kind] = _under(media_root, source)


def _under(root: str | os.PathLike | None, source: Any) -> Any:
    if isinstance(source, (list, tuple)):  # the frames of a video as images
        return [_under(root, frame) for frame in source]
    if root is None or not isinstance(source, str) or URL.match(source):
        return source
    return os.path.join(root, source)
