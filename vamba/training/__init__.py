"""Training: recipes, and `finetune`, which follows them. Nothing heavy is imported before it is used."""

import importlib


_HOMES = {
    "Recipe": "arguments",
    "RecipeError": "arguments",
    "VambaTrainingArguments": "arguments",
    "load_recipe": "arguments",
    "shipped_recipes": "arguments",
    "NonFiniteLossError": "evaluation",
    "VambaTrainer": "trainer",
    "Result": "run",
    "finetune": "run",
    "make_trainer": "run",
    "prepare": "run",
    "save": "saving",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
