"""The benchmark of the README: the 7B's size with random weights against the length of the video, beside Qwen2-VL.

    python benchmarks/video_length.py [options of `vamba bench`, which win]

One process, one GPU, some four minutes; without matplotlib the plots are drawn later, by `vamba bench --plot CSV`.
"""

import sys

from vamba.cli import main


STANDARD = ["--model", "7b", "--peer", "qwen2-vl", "--max-seconds", "90", "--out", "benchmarks/results"]
FRAMES = ["--frames", "128", "512", "1024", "2048", "3600", "10000"]


if __name__ == "__main__":
    sys.exit(main(["bench", *STANDARD, *FRAMES, *sys.argv[1:]]))
