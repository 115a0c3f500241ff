"""The curves of a run as a picture, `curves.png` in its output folder: losses, accuracy and learning rate by step."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from vamba.bench.report import Line, draw
from vamba.errors import UserError


CURVES_FILE = "curves.png"
_PANELS = {"loss": ("loss", "_loss"), "accuracy": ("eval_accuracy",), "learning rate": ("learning_rate",)}
_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
logger = logging.get_logger(__name__)


class Curves(TrainerCallback):
    """Draws them at each save and at the end; says once why it cannot."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            try:
                draw_curves(Path(args.output_dir) / CURVES_FILE, state.log_history)
            except (UserError, OSError) as error:
                logger.warning_once(f"{error}")

    on_train_end = on_save


def draw_curves(path: Path, history: list[dict[str, Any]]) -> Path:
    """Draws what a trainer has logged: a panel for each kind of number, a line for each name.

    Raises:
        UserError: matplotlib is not installed.
    """
    panels = []
    for label, ends in _PANELS.items():
        names = dict.fromkeys(
            name for entry in history for name in entry if name.endswith(ends) and name != "train_loss"
        )
        points = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names}
        styles = ["o-" if name.startswith("eval_") else "-" for name in names]
        lines = [Line(*line) for line in zip(names, points.values(), _COLORS * len(names), styles)]
        panels += [(label, lines)] if lines else []
    return draw(path, panels, "step", scale="linear")
