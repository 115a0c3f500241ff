"""What processes agree on before they work: the main one decides, and an error of one is an error of all.

A process that raised alone, or counted another number of steps than the others, would leave them waiting in their next
collective. Through gloo they notice that it is gone; on GPUs they would wait until their launcher kills them.
"""

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import TCPStore

from .errors import UserError


T = TypeVar("T")
_RUNS = itertools.count()  # of this process; each has a key of its own in the store that the processes met at
POLL, GRACE = 1.0, 5.0  # seconds between looks at it, and for a process to end by itself


def agreed(function: Callable[[], T], *, decided_by_main: bool = False) -> T:
    """`function()` on every process, or on the main one, whose result all return then.

    Raises:
        Whatever it raises, on the process where it does; UserError with the same message on the others.
    """
    result: Any = None
    error: Exception | None = None
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
            raise UserError(message)
    return outcomes[0][0] if decided_by_main else result


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within, an error on one process ends all others within seconds, whatever they are waiting in."""
    rank, world = PartialState().process_index, PartialState().num_processes
    if world == 1:
        yield
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    mine, theirs = (TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60)) for _ in range(2))
    # A launcher that starts the processes again after an error keeps the store.
    key = f"vamba/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_RUNS)}"
    over = threading.Event()

    def watch() -> None:
        failed = None
        while failed is None:
            if over.wait(POLL):
                return
            try:
                failed = theirs.get(key).decode() if theirs.check([key]) else None
            except RuntimeError:  # the store went with the process that held it
                failed = "0"
        if not over.wait(GRACE):
            print(f"vamba: ends as process {failed} failed", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, name="vamba-ending-together", daemon=True).start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            mine.set(key, str(rank))
        raise
    finally:
        over.set()
