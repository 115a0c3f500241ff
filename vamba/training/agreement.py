"""What processes agree on before they train: the main one decides, and an error of one is an error of all.

A process that raised alone, or counted another number of steps than the others, would leave them waiting in their next
collective.
"""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from .strict import RecipeError


T = TypeVar("T")


def agreed(function: Callable[[], T], *, decided_by_main: bool = False) -> T:
    """`function()` on every process, or on the main one, whose result all return then.

    Raises:
        Whatever it raises, on the process where it does; RecipeError with the same message on the others.
    """
    result, error = None, None
    if PartialState().is_main_process or not decided_by_main:
        try:
            result = function()
        except Exception as raised:
            error = raised
    outcomes = gather_object([(result if decided_by_main else None, error and f"{error}")])
    if error is not None:
        raise error
    for _, message in outcomes:
        if message is not None:
            raise RecipeError(message)
    return outcomes[0][0] if decided_by_main else result
