"""Nested mappings to dataclasses, strictly: what a recipe may say is what its dataclasses say.

What is unusual: every mistake is one line with the full name of the key (`data.train[0].path`), what is there and what
is accepted.
"""

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from vamba.errors import UserError


class RecipeError(UserError):
    """A recipe that cannot be followed: one line that names the key and what is accepted."""


def build(kind: type, values: Any, where: str) -> Any:
    """An instance of dataclass `kind` out of a mapping."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where.rstrip('.') or 'the recipe'} is {values!r}; accepted: {key_names(kind)}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise RecipeError(unknown_key(f"{where}{key}", str(key), list(hints)))
    for known in dataclasses.fields(kind):
        if known.name not in values and known.default is known.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{where}{known.name} is missing; accepted: {_described(hints[known.name])}")
    return kind(**{key: checked_value(hints[key], value, f"{where}{key}") for key, value in values.items()})


def checked_value(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` wants it, or a RecipeError."""
    for kind in _alternatives(hint):
        if dataclasses.is_dataclass(kind) and value is not None:
            return build(kind, value, f"{where}.")
        converted = _converted(kind, value, where)
        if converted is not _WRONG:
            return converted
    raise RecipeError(f"{where} is {value!r}; accepted: {_described(hint)}")


_WRONG = object()


def _converted(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any or (kind in (None, type(None)) and value is None):
        return value
    if origin is Literal:
        return value if any(value is choice or value == choice for choice in typing.get_args(kind)) else _WRONG
    if origin is list or kind is list:
        inner = (typing.get_args(kind) or (Any,))[0]
        return (
            [checked_value(inner, v, f"{where}[{i}]") for i, v in enumerate(value)]
            if isinstance(value, list)
            else _WRONG
        )
    if origin is dict or kind is dict:
        return dict(value) if isinstance(value, Mapping) else _WRONG
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        value = "no" if value is False else value  # which is how YAML 1.1 reads no
        return value if value in {member.value for member in kind} else _WRONG
    if kind is float and not isinstance(value, bool):  # YAML 1.1 reads 1e-5 as a text
        try:
            return float(value)
        except (TypeError, ValueError):
            return _WRONG
    if kind in (int, bool, str) and type(value) is kind:
        return value
    return _WRONG


def _alternatives(hint: Any) -> list:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    kinds = list(typing.get_args(hint))
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return enums or kinds  # an enum "or text" accepts the enum's texts only


def _described(hint: Any) -> str:
    """What is accepted, in words."""
    words = []
    for kind in _alternatives(hint):
        if dataclasses.is_dataclass(kind):
            words.append(f"the keys {key_names(kind)}")
        elif typing.get_origin(kind) is Literal:
            words += [str(choice) for choice in typing.get_args(kind)]
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            words += [member.value for member in kind]
        elif typing.get_origin(kind) is list:
            words.append(f"a list of {_described(typing.get_args(kind)[0])}")
        else:
            plain = {int: "a whole number", float: "a number", bool: "true, false", str: "a text", type(None): "null"}
            words.append(plain.get(kind, "a mapping"))
    return ", ".join(words)


def key_names(kind: type) -> str:
    return ", ".join(known.name for known in dataclasses.fields(kind))


def unknown_key(where: str, key: str, accepted: list[str]) -> str:
    close = difflib.get_close_matches(key, accepted, 1)
    return f"{where} is no key{f', {close[0]} is' if close else ''}; accepted: {', '.join(accepted)}"
