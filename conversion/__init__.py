"""Checkpoint converters: Qwen2-VL and the original Vamba format to ours and back; Mamba-2 and CLIP to Video-Ma2mba.

Imports nothing heavy: `convert` and its helpers are resolved when first used.
"""

from importlib import import_module


_LAZY = {
    "convert": "checkpoint",
    "ConversionError": "planning",
    "is_earlier_format": "vamba_family",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
