"""Training: recipes, and `finetune`, which follows them. Nothing heavy is imported before it is used."""

import importlib


_HOMES = {
    "Recipe": "recipe",
    "RecipeError": "strict",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "shipped_recipes": "recipe",
    "Result": "finetune",
    "VambaTrainer": "trainer",
    "prepare": "preparation",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
