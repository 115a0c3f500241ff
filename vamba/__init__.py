"""Linear-time video understanding in the Hugging Face ecosystem.

`import vamba` makes transformers' Auto classes know Vamba and Video-Ma2mba and imports neither torch nor transformers
to do so: the classes are found when they are asked for.
"""

import importlib

from ._registration import register_with_transformers


__version__ = "0.1.0"

_HOMES = {
    "UserError": ".errors",
    "VideoChat": ".chat",
    "VambaConfig": ".modeling",
    "VambaForConditionalGeneration": ".modeling",
    "VambaModel": ".modeling",
    "VambaProcessor": ".modeling",
    "StateMemory": ".modeling",
    "VideoMa2mbaConfig": ".modeling",
    "VideoMa2mbaForConditionalGeneration": ".modeling",
    "VideoMa2mbaModel": ".modeling",
    "VideoMa2mbaProcessor": ".modeling",
    "VideoMemory": ".modeling",
    "VideoReadError": ".errors",
    "load_video": ".video",
    "read_video": ".video",
    "register_with_qwen_vl_utils": ".video.qwen_vl_utils_reader",
    "conversion": None,
    "data": None,
    "evaluation": None,
    "hub": None,
    "modeling": None,
    "training": None,
    "video": None,
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(home, __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])


register_with_transformers()
