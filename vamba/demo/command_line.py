"""The arguments of `vamba demo`, and its exit code: 0 only where the model has learned its task."""

import argparse


MAX_THREADS = 4  # more only wait for each other over matrices this small; as many cores read videos meanwhile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("vamba", "video-ma2mba"), default="vamba", help="default: vamba")
    parser.add_argument("--output-dir", default="runs/demo", metavar="FOLDER", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="of the videos, the weights and the training; default: 0")
    parser.add_argument("--steps", type=int, help="of the training; the default takes two or three minutes")


def run(args: argparse.Namespace) -> int:
    """0 if the accuracy is reached, 1 if not."""
    import torch

    from vamba import demo
    from vamba.errors import UserError

    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, must be at least 1")
    torch.set_num_threads(max(1, min(torch.get_num_threads() // 2, MAX_THREADS)))
    results = demo.run(args.output_dir, model=args.model, seed=args.seed, steps=args.steps)
    return 0 if results["accuracy"] >= demo.REQUIRED_ACCURACY else 1
