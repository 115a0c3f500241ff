"""A user's mistake, as opposed to a fault of the program: what the command line answers to with one line."""


class UserError(ValueError):
    """What was asked for cannot be done: one line that names the value and the remedy. A fault is anything else."""
