"""Clocks, peaks of memory, the rates of a machine and what it is: for `vamba bench` and for the scripts in benchmarks/.

What is unusual: times on a GPU are taken when it has done all it was given (`now`), or by events in its own queue
(`Stopwatch`), which it is not waited for.
"""

import gc
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import StoppingCriteria


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device: torch.device) -> float:
    """The time, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device, baseline: int = 0) -> int | None:
    """Bytes at most allocated since `reset_peak`, over `baseline`; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) - baseline if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Gives back what nobody holds, so that one measurement does not weigh on the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class TokenClock(StoppingCriteria):
    """Given to `generate`: never stops it, and notes when each token is there. The first one ends the prefill."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.times.append(now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def milliseconds_per_token(self) -> float:
        return 1e3 * statistics.median(b - a for a, b in zip(self.times, self.times[1:]))


class Stopwatch:
    """Seconds between marks, taken on the device without waiting for it."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        now(self.device)
        return [self.between(a, b) for a, b in zip(self.marks, self.marks[1:])]

    def between(self, first, last) -> float:
        return first.elapsed_time(last) / 1e3 if self.device.type == "cuda" else last - first


def last_to_first(chunks: Sequence[float]) -> float | None:
    """Time of the last tenth of the whole chunks over that of the first; None where there are too few."""
    tenth = len(chunks) // 10
    return sum(chunks[-tenth - 1 : -1]) / sum(chunks[1 : tenth + 1]) if tenth else None  # the ends are irregular


def seconds_of(function: Callable, device: torch.device, repeats: int = 10, before: Callable = lambda: None) -> float:
    """Median of some calls, after three; `before` is called before each and not timed."""
    watch = Stopwatch(device)
    for _ in range(3 + repeats):
        before()
        watch.mark()
        function()
        watch.mark()
    return statistics.median(watch.seconds()[6::2])


def seconds_of_steps(step: Callable, device: torch.device, limit: float) -> dict:
    """How long a step of training takes and the memory it needs; the step leaves no gradients, or always the same.

    Returns:
        status: "ok" or "out of memory". seconds: median of up to three calls within `limit` seconds, after one that is
        left out unless it took a quarter of them. runs: how many. over: bytes of the peak over what was there before,
        None where they are not counted.
    """
    release(device)
    before = allocated(device)
    reset_peak(device)
    times = []
    try:
        while not times or (times[0] < limit / 4 and len(times) < 4 and sum(times) + times[-1] < limit):
            start = now(device)
            step()
            times.append(now(device) - start)
    except RuntimeError as error:  # of the GPU's memory, or of what can be pinned of the CPU's
        if "out of memory" not in str(error).lower():
            raise
        return {"status": "out of memory"}
    times = times[1:] or times
    return {"status": "ok", "seconds": statistics.median(times), "runs": len(times), "over": peak(device, before)}


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict:
    """Operations per second of a large matrix product, and bytes read and written per second by a large copy."""
    size, numbers = (8192, 2**30) if device.type == "cuda" else (256, 2**22)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(numbers, dtype=dtype, device=device).normal_()
    copy = torch.empty_like(source)
    return {
        "matrix_per_s": 2 * size**3 / seconds_of(lambda: a @ b, device),
        "copied_bytes_per_s": 2 * source.nbytes / seconds_of(lambda: copy.copy_(source), device),
    }


def kernels_of(function: Callable, device: torch.device, calls: int = 1) -> list[dict]:
    """Rows (kernel, calls, ms) of one call of `function`, the slowest first; operators where there is no GPU."""
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(calls):
            function()
        now(device)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, field))
    rows = [{"kernel": e.key, "calls": e.count // calls, "ms": getattr(e, field) / 1e3 / calls} for e in events]
    return [row for row in rows if row["ms"] > 0]


def command() -> str:
    """The command line with the names alone of absolute paths, which would tell of the machine."""
    return re.sub(r"(?<![^\s=:])/(?:[^/\s]+/+)*", "", " ".join(sys.argv))


def machine(device: torch.device) -> dict:
    """What a report names: date, command, device and versions."""
    cuda = device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": command(),
        "device": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
