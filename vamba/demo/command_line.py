"""The arguments of `vamba demo`, and its exit code: 0 only where the model has learned its task."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("vamba", "video-ma2mba"), default="vamba", help="default: vamba")
    parser.add_argument("--output-dir", default="runs/demo", metavar="FOLDER", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="of the videos, the weights and the training; default: 0")
    parser.add_argument("--steps", type=int, help="of the training; the default takes two or three minutes")


def run(args: argparse.Namespace) -> int:
    """0 if the accuracy is reached, 1 if not."""
    from vamba.errors import UserError

    from . import REQUIRED_ACCURACY
    from . import run as run_demo

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, must be at least 1")
    results = run_demo(args.output_dir, model=args.model, seed=args.seed, steps=args.steps)
    return 0 if results["accuracy"] >= REQUIRED_ACCURACY else 1
