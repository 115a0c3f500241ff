"""The arguments of `vamba finetune`, and what it prints."""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that is shipped")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in the output folder"
    )
    parser.epilog = "Every key of a recipe is an option too, which overrides it: --learning_rate 1e-5"
    parser.set_defaults(overrides=[])  # what this parser does not know


def run(args: argparse.Namespace) -> int:
    """0 when the model is trained and saved, 143 when SIGTERM stopped it after a save; mistakes are exceptions."""
    from .run import finetune

    result = finetune(args.recipe, args.overrides, resume=args.resume)
    code, said = 0, f"trained {result.steps} steps; the model is in {result.folder}"
    if not result.trained:
        said = f"the run is finished: it has trained {result.steps} steps, and the model is in {result.folder}"
    elif result.folder is None:
        code, said = 143, f"stopped by SIGTERM after step {result.steps}; it is saved, go on with --resume"
    if os.environ.get("RANK", "0") == "0":  # one of the processes that a launcher started speaks
        print(said)
    return code
