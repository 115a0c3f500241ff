"""Runs a function in a child process and kills it with SIGKILL at a moment of choice, again and again.

What is unusual: children are forked from a process that has imported everything and has a single thread
(multiprocessing's forkserver), so that each takes milliseconds. A moment is either a time, or a number of file
operations after which the child kills itself: the latter reaches every state that the disk can be in.

`VAMBA_KILLS` in the environment says how many moments `moments` and `steps` draw (default 1). The function and its
arguments must be picklable: define it at the top of a test module.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any


KILLS = int(os.environ.get("VAMBA_KILLS", "1"))
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *("pytest", "vamba.demo.pipeline", "vamba.hub", "vamba.chat", "vamba.modeling.modeling_vamba"),
        *("transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.qwen2_vl.processing_qwen2_vl"),
        *("vamba.modeling.modeling_video_ma2mba", "vamba.modeling.processing_video_ma2mba", "safetensors.torch"),
    ]
)


def moments(seconds: float, seed: int = 0) -> Iterator[float]:
    """Random moments of a function that takes `seconds`; some come after its end."""
    draw = random.Random(seed)
    return (draw.uniform(0, 1.05 * seconds) for _ in range(KILLS))


def steps(operations: int, seed: int = 0) -> Iterator[int]:
    """Random numbers of file operations of a function that does so many, each at most once; at the end, the last."""
    return iter(sorted({*random.Random(seed).sample(range(operations), min(KILLS, operations)), operations - 1}))


def run_to_the_end(function: Callable, *args: Any) -> tuple[float, int]:
    """The seconds and file operations that `function` takes in a child. Raises RuntimeError where it raises."""
    process, channel = _start(function, args, None)
    began = time.perf_counter()
    operations = channel.recv()
    seconds = time.perf_counter() - began
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} exits with {process.exitcode}")
    return seconds, operations


def kill_at(function: Callable, *args: Any, seconds: float | None = None, step: int | None = None) -> bool:
    """Whether `function` was killed, `seconds` after its start or before its file operation number `step`.

    Raises RuntimeError where it raises before that moment.
    """
    process, channel = _start(function, args, step)
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{function.__name__} exits with {process.exitcode}")
    return process.exitcode != 0


def start(function: Callable, *args: Any) -> Any:
    """A child in which `function` has begun: a multiprocessing process, to be killed, or joined for its exit code."""
    process, process.channel = _start(function, args, None)
    return process


def _start(function, args, step):
    ours, theirs = _FORKS.Pipe()
    process = _FORKS.Process(target=_child, args=(theirs, function, args, step), daemon=False)
    process.start()
    theirs.close()
    ours.recv()
    return process, ours


def _child(channel, function, args, step):
    done = 0

    def count(event, values):
        nonlocal done
        # a file opened to be read changes nothing
        if event in FILE_OPERATIONS and not (event == "open" and not _writes(*values)):
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    channel.send("begun")
    sys.addaudithook(count)
    try:
        function(*args)
    except BaseException:
        traceback.print_exc()
        done = -1
    channel.send(done)
    sys.stderr.flush()
    os._exit(0 if done >= 0 else 1)


def _writes(path, mode, flags) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "r" != mode
