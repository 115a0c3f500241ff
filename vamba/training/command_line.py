"""The arguments of `vamba finetune`, and what it prints."""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that is shipped")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="in place of what the recipe says, e.g. --set train.max_steps=100; may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint in the output folder"
    )


def run(args: argparse.Namespace) -> int:
    """0 when the model is trained and saved, 143 when SIGTERM stopped it after a save; mistakes are exceptions."""
    from vamba.errors import opening

    from .recipe import load_recipe

    with opening(args.recipe):
        recipe = load_recipe(args.recipe, args.overrides)
    from .finetune import finetune

    result = finetune(recipe, resume=args.resume)
    code, said = 0, f"trained {result.steps} steps; the model is in {result.folder}"
    if not result.trained:
        said = f"the run is finished: it has trained {result.steps} steps, and the model is in {result.folder}"
    elif result.folder is None:
        code, said = 143, f"stopped by SIGTERM after step {result.steps}; it is saved, go on with --resume"
    if os.environ.get("RANK", "0") == "0":  # one of the processes that a launcher started speaks
        print(said)
    return code
