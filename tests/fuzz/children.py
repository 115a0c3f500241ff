"""One case in a child process with limits, and a verdict on how it ended.

Children are forked from a process that has imported everything, as importing it takes several seconds. What is unusual:
the verdict is not only on errors. A case also fails if it crashes or hangs, takes too much memory, leaves descriptors,
threads or processes behind, connects to anything, starts a program, or writes outside its folder.
"""

import faulthandler
import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


SECONDS = 30.0
MEMORY = 700 * 2**20  # of resident memory, more than before
ADDRESSES = 6 * 2**30  # of virtual memory, more than before: an allocation beyond it fails at once
DESCRIPTORS = 128
FILE_SIZE = 2**28
LONGEST = 2000  # characters of a message
PASSED = ("result", "refused")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


@dataclass
class Verdict:
    """`outcome` is "result", "refused" (by one of the accepted errors), or what went wrong; `text` says more."""

    outcome: str
    text: str
    seconds: float = 0.0
    peak: int = 0  # bytes of resident memory, more than before

    @property
    def passed(self) -> bool:
        return self.outcome in PASSED


def run_case(case: Callable[[Path], Callable], accepted: tuple[type, ...], seconds: float = SECONDS) -> Verdict:
    """Prepares a case by `case(folder)` and runs what that returns, in a child with a folder of its own.

    Args:
        accepted: errors with which the case may end; of ValueError and FileNotFoundError no subclass is accepted that
            is not ours.
    """
    folder = Path(tempfile.mkdtemp(prefix="case-"))
    read, write = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(case, accepted, folder, write)
    os.close(write)
    try:
        said, status = _wait(child, read, began + seconds)
        text = (folder / "stderr").read_text(errors="replace")[-2000:] if (folder / "stderr").exists() else ""
    finally:
        os.close(read)
        left = _kill_group(child)
        shutil.rmtree(folder, ignore_errors=True)
    took = time.monotonic() - began
    if status is None:
        return Verdict("hang", f"no end in {seconds:g} s; {text}", took)
    if os.WIFSIGNALED(status):
        return Verdict("crash", f"{signal.Signals(os.WTERMSIG(status)).name}; {text}", took)
    if not said:
        return Verdict("crash", f"exit {os.waitstatus_to_exitcode(status)} without a verdict; {text}", took)
    verdict = Verdict(*json.loads(said))
    verdict.seconds = took
    if verdict.passed and left:
        verdict.outcome, verdict.text = "leak", "a process is left"
    elif verdict.passed and verdict.peak > MEMORY:
        verdict.outcome = "memory"
    return verdict


def _wait(child: int, read: int, deadline: float) -> tuple[bytes, int | None]:
    """What the child wrote, and its status, None if it did not end in time."""
    said = b""
    while not said.endswith(b"\n") and select.select([read], [], [], max(0, deadline - time.monotonic()))[0]:
        if not (part := os.read(read, 2**16)):
            break
        said += part
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return said, status
        if time.monotonic() > deadline + 1:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return said, None
        time.sleep(0.002)


def _kill_group(group: int) -> bool:
    """Ends what the child has left running; whether there was anything."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _child(case, accepted, folder: Path, write: int) -> None:
    os.setpgid(0, 0)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    os.chdir(folder)
    output = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    faulthandler.enable(output)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    peak = 0
    try:
        try:
            use = case(folder)
        except BaseException:
            verdict = "fault of the harness", traceback.format_exc()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
            before = _resident("VmRSS")
            verdict = _judge(use, accepted, folder)
            peak = max(0, _resident("VmHWM") - before)
        os.write(write, json.dumps([*map(_printable, verdict), 0.0, peak]).encode() + b"\n")
    finally:  # whatever happens: above is the code of the process that forked
        os._exit(0)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _judge(use, accepted, folder: Path) -> tuple[str, str]:
    done: list[str] = []
    sys.addaudithook(lambda event, about: _note(event, about, folder, done))
    _limit(resource.RLIMIT_AS, _virtual() + ADDRESSES)
    _limit(resource.RLIMIT_NOFILE, DESCRIPTORS)
    _limit(resource.RLIMIT_FSIZE, FILE_SIZE)
    _limit(resource.RLIMIT_CORE, 0)
    gc.freeze()  # what was there before is not looked at again, which would copy all of it
    before = _held()
    try:
        outcome, text = "result", str(use())[:200]
    except BaseException as error:
        outcome, text = "refused", f"{type(error).__name__}: {error}"
        ours = type(error) in accepted or isinstance(error, accepted) and type(error).__module__.startswith("vamba")
        if not ours:
            outcome, text = "foreign error", traceback.format_exc()[-4000:]
        elif not str(error).strip() or len(text) > LONGEST:
            outcome, text = "no sentence", text[:1000]
        error.__traceback__ = None
        del error
    if done:
        return "forbidden", "; ".join(done)
    for _ in range(40):  # threads take a moment to end
        gc.collect()
        if (held := _held()) <= before:
            return outcome, text
        time.sleep(0.05)
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return "leak", f"(descriptors, threads) {before} -> {held}: {opened}; {text}"


def _note(event: str, about: tuple, folder: Path, done: list[str]) -> None:
    if event in _FORBIDDEN:
        done.append(f"{event} {about!r:.200}")
    if event == "open" and isinstance(about[0], (str, bytes)) and about[2] & _WRITING:
        path = os.path.abspath(os.fsdecode(about[0]))
        if not path.startswith((str(folder), os.environ.get("HF_HOME", os.devnull), "/dev/", "/proc/self")):
            done.append(f"opened {path} to write")


class _Held(tuple):
    def __le__(self, other):
        return all(now <= then for now, then in zip(self, other))


def _held() -> _Held:
    """How many descriptors and threads there are, without the fonts that matplotlib keeps open."""
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return _Held((sum("/mpl-data/" not in path for path in opened), len(os.listdir("/proc/self/task"))))


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
