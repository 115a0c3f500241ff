"""The arguments of `vamba bench`."""

import argparse
import os

from vamba.console import positive, quiet_transformers
from vamba.errors import UserError, check_writable, opening


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH|7b", help='a Vamba checkpoint, or "7b": the published size with random weights'
    )
    parser.add_argument(
        "--frames", type=positive, nargs="+", default=[128, 512, 1024], help="lengths; default: 128 512 1024"
    )
    parser.add_argument("--peer", choices=("qwen2-vl",), help="measure transformers' model of the same sizes as well")
    parser.add_argument("--out", metavar="DIR", help="write tables (CSV), plots (PNG) and a report (Markdown) here")
    parser.add_argument("--plot", metavar="CSV", help="only draw the plots of a table, beside it")
    parser.add_argument("--video", nargs="+", metavar="FILE", help="decode these; default: a 720p clip made here")
    parser.add_argument("--patches", type=positive, nargs=2, default=[26, 46], metavar=("H", "W"),
                        help="patches of a frame; default: 26 46, which are 640x360 pixels")  # fmt: skip
    parser.add_argument("--chunk-frames", type=positive, default=128, help="frames encoded at once; default: 128")
    parser.add_argument("--prompt-tokens", type=positive, default=128, help="default: 128")
    parser.add_argument("--new-tokens", type=positive, default=32, help="default: 32")
    parser.add_argument(
        "--max-seconds", type=float, default=60, help="leave out lengths whose prefill would take longer; default: 60"
    )
    parser.add_argument("--device", help='e.g. "cuda:0" or "cpu"; default: a GPU if there is one')


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; raises UserError for a user's mistake."""
    from . import report

    if args.plot:
        try:
            with opening(args.plot):
                if not os.path.isfile(args.plot):
                    raise UserError(f"--plot {args.plot} is no file; give the table (CSV) of a report.")
                paths = report.plot(args.plot)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"--plot {args.plot} is no table of `vamba bench` ({error}).") from error
        for path in paths:
            print(path)
        return 0
    if args.model is None:
        raise UserError("--model is missing: give the folder of a Vamba checkpoint, or 7b for random weights.")
    largest = {"frames": 2**20, "patches": 2**12, "chunk_frames": 2**16, "prompt_tokens": 2**20, "new_tokens": 2**16}
    for name, most in largest.items():
        given = getattr(args, name)
        if (value := max(given) if isinstance(given, list) else given) > most:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at most {most}.")
    if args.new_tokens < 2:
        raise UserError("--new-tokens is 1; give at least 2, as the time of a token is that between two.")
    if args.out:
        check_writable(args.out)
    from vamba.modeling.memory_files import checked_device

    from .measure import measure_all

    if args.device is not None:
        try:
            checked_device(args.device)
        except ValueError as error:
            raise UserError(f"--device: {error}") from error

    quiet_transformers()
    results = measure_all(args)
    print(report.markdown(results))
    if args.out:
        for path in report.write(results, args.out):
            print(path)
    return 0
