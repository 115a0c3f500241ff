"""Mutated videos: reading ends in frames or in a VideoReadError, soon, without a leak and without bringing FFmpeg down.

Run as a script, this file is the worker: one process per container format, so that a crash of the decoder names its
format and seed instead of ending pytest.
"""

import faulthandler
import io
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from encoded_videos import FORMATS


FILES_PER_FORMAT = 180
SECONDS_PER_FILE = 10.0
RSS_GROWTH = 150 * 2**20
CASES = {kind: FORMATS[kind] for kind in ("mp4", "mkv", "avi", "gif", "webm", "ts")}
READS = (
    {"fps": 1000.0},
    {"num_frames": 3},
    {"fps": 0.5, "threads": 1},
    {"num_frames": 4, "start": 9.0, "end": 31.0},
    {"fps": 0.1, "start": 0.5},
    {"fps": 3.0, "resize": True, "max_pixels": 56 * 56, "min_pixels": 0},
)


def small_video(kind):
    """40 pictures, one per second, a key frame every four: small files in which the reader nevertheless jumps."""
    import av
    import numpy as np

    container_name, codec, pix_fmt = CASES[kind]
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    with av.open(buffer, "w", format=container_name) as container:
        stream = container.add_stream(codec, rate=1)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.gop_size = pix_fmt, 4
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "bf": "1"}
        picture = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        for _ in range(40):
            picture = np.roll(picture, 1, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def mutate(video, rng):
    """One to three random injuries, of kinds that downloads, disks and attackers cause."""
    video = bytearray(video)
    for _ in range(rng.choice((1, 1, 2, 3))):
        size = len(video)
        if size < 16:
            break
        place, length = rng.randrange(size), rng.randrange(1, max(size // 4, 2))
        header = rng.randrange(min(size, 1024)) if rng.random() < 0.5 else size - 1 - rng.randrange(min(size, 2048))
        kind = rng.randrange(8)
        if kind == 0:
            for _ in range(rng.choice((1, 4, 30))):
                video[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del video[place:]
        elif kind == 2:
            del video[place : place + length]
        elif kind == 3:
            video[place:place] = video[place : place + length]
        elif kind == 4:
            video[header] = rng.randrange(256)
        elif kind == 5:
            extreme = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b"\0\0\0\1"))
            video[header : header + 4] = extreme
        elif kind == 6:
            video[place : place + length] = bytes(min(length, size - place))
        else:
            other = rng.randrange(size)
            video[place : place + length] = video[other : other + length]
    return bytes(video)


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_one(source, options):
    """'read' or 'refused'; anything else that happens is a failure of the reader."""
    from vamba.video import VideoReadError, read_video

    last, count = -math.inf, 0
    try:
        with read_video(source, **{"resize": False, "chunk_frames": 4, **options}) as reader:
            for chunk in reader:
                assert chunk.frames.shape[2:] == reader.frame_size and 0 < len(chunk) <= 4
                for stamp in chunk.timestamps.tolist():
                    assert math.isfinite(stamp) and stamp >= last, (stamp, last)
                    last, count = stamp, count + 1
                assert count <= 200, "more frames than were ever in the file"
        return "read"
    except VideoReadError as error:
        assert "\n" not in str(error) and str(error).startswith(("<", "/")), str(error)
        return "refused"


def work(kind, count, folder):
    faulthandler.enable()
    warnings.simplefilter("ignore")
    video, path = small_video(kind), Path(folder) / f"mutant.{kind}"
    outcome, slowest, baseline = {"read": 0, "refused": 0}, 0.0, None
    for options in READS:
        assert read_one(video, options) == "read", options
    for seed in range(count):
        mutant, options = mutate(video, random.Random(f"{kind}{seed}")), READS[seed % len(READS)]
        path.write_bytes(mutant)
        print(f"{kind} seed {seed} {options}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(2 * SECONDS_PER_FILE, exit=True)
        began = time.monotonic()
        outcome[read_one(path if seed % 2 else mutant, options)] += 1
        slowest = max(slowest, time.monotonic() - began)
        faulthandler.cancel_dump_traceback_later()
        if seed == count // 4:
            baseline = rss(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    growth = rss() - baseline[0]
    leaks = len(os.listdir("/proc/self/fd")) - baseline[1], len(os.listdir("/proc/self/task")) - baseline[2]
    print(json.dumps({**outcome, "slowest": slowest, "rss_growth": growth, "fds": leaks[0], "threads": leaks[1]}))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    pytest.importorskip("av")
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}

    def run(kind):
        command = [sys.executable, __file__, kind, str(FILES_PER_FORMAT), str(tmp_path_factory.mktemp(kind))]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES)))


@pytest.mark.parametrize("kind", list(CASES))
def test_mutants_end_in_frames_or_in_one_clear_error(outcomes, kind):
    done = outcomes[kind]
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["read"] + result["refused"] == FILES_PER_FORMAT
    assert result["read"] > 10 and result["refused"] > 0, "the mutations are too harsh or too mild to test anything"
    assert result["slowest"] < SECONDS_PER_FILE, result
    assert result["fds"] <= 0 and result["threads"] < 5, result
    assert result["rss_growth"] < RSS_GROWTH, result


def test_there_are_enough_mutants():
    assert FILES_PER_FORMAT * len(CASES) >= 1000


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
