"""The model definition: exactly the files that travel to the Hub with a checkpoint, plus this index of them.

Nothing is imported before it is used, so `import vamba.modeling` costs nothing.
"""

import importlib


_HOMES = {
    "VambaConfig": "configuration_vamba",
    "VambaMamba2Config": "configuration_vamba",
    "VambaTextConfig": "configuration_vamba",
    "VambaForConditionalGeneration": "modeling_vamba",
    "VambaModel": "modeling_vamba",
    "VambaPreTrainedModel": "modeling_vamba",
    "VambaTextModel": "modeling_vamba",
    "VambaVideoEncoder": "modeling_vamba",
    "VambaProcessor": "processing_vamba",
    "VideoMa2mbaConfig": "configuration_video_ma2mba",
    "VideoMa2mbaTextConfig": "configuration_video_ma2mba",
    "VideoMa2mbaVisionConfig": "configuration_video_ma2mba",
    "VideoMa2mbaForConditionalGeneration": "modeling_video_ma2mba",
    "VideoMa2mbaModel": "modeling_video_ma2mba",
    "VideoMa2mbaPreTrainedModel": "modeling_video_ma2mba",
    "VideoMa2mbaTextModel": "modeling_video_ma2mba",
    "VideoMa2mbaProcessor": "processing_video_ma2mba",
    "StateMemory": "state_memory",
    "VideoMemory": "video_memory",
    "Mamba2Block": "mamba2",
    "Mamba2Mixer": "mamba2",
    "Mamba2State": "mamba2",
    "ssd_scan": "mamba2",
    "causal_conv1d": "mamba2",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
