"""Makes transformers' Auto classes, pipelines and `transformers serve` know Vamba and Video-Ma2mba.

What is unusual: every `Auto*.register` wants a class of ours, and the smallest of them would import torch on `import
vamba` (three seconds). transformers' own models are listed by name instead and imported when asked for, from
`transformers.models.<type>`; we enter our names in the same dictionaries, which pipelines and `transformers serve` read
too, and `vamba.modeling` answers under that address. Where transformers' auto modules are not imported yet, the names
are entered right after they are.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

from . import modeling


_AUTO = "transformers.models.auto."
_ADDRESS = "transformers.models.vamba"
_PREFIXES = {"vamba": "Vamba", "video_ma2mba": "VideoMa2mba"}


def _each(suffix: str) -> dict[str, str]:
    return {model_type: prefix + suffix for model_type, prefix in _PREFIXES.items()}


_CONFIGS = _each("Config") | {
    "vamba_text": "VambaTextConfig",
    "vamba_mamba2": "VambaMamba2Config",
    "video_ma2mba_text": "VideoMa2mbaTextConfig",
    "video_ma2mba_vision": "VideoMa2mbaVisionConfig",
}
_IMAGE_PROCESSORS = {"torchvision": "Qwen2VLImageProcessor", "pil": "Qwen2VLImageProcessorPil"}
# auto module -> mapping -> {model type: class name}; the names of a MAPPING stand in its MAPPING_NAMES
_ENTRIES = {
    "configuration_auto": {"CONFIG_MAPPING": _CONFIGS},
    "modeling_auto": {
        "MODEL_MAPPING": _each("Model") | {"vamba_text": "VambaTextModel"},
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": _each("ForConditionalGeneration"),
        "MODEL_FOR_MULTIMODAL_LM_MAPPING": _each("ForConditionalGeneration"),
    },
    "processing_auto": {"PROCESSOR_MAPPING": _each("Processor")},
    "tokenization_auto": {"TOKENIZER_MAPPING": {"vamba": "Qwen2Tokenizer", "video_ma2mba": "GPTNeoXTokenizer"}},
    "image_processing_auto": {"IMAGE_PROCESSOR_MAPPING": dict.fromkeys(_PREFIXES, _IMAGE_PROCESSORS)},
    "video_processing_auto": {
        "VIDEO_PROCESSOR_MAPPING": dict.fromkeys(_PREFIXES, {"torchvision": "Qwen2VLVideoProcessor"})
    },
}


def register_with_transformers() -> None:
    """Registers now with the auto modules that are imported, and with the others when they will be."""
    sys.modules.setdefault(_ADDRESS, modeling)
    for name in _ENTRIES:
        if (module := sys.modules.get(_AUTO + name)) is not None:
            _register(name, module)
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register(name: str, module) -> None:
    if name == "configuration_auto":
        module.SPECIAL_MODEL_TYPE_TO_MODULE_NAME.update(dict.fromkeys(_CONFIGS, "vamba"))
    for mapping, entries in _ENTRIES[name].items():
        getattr(module, f"{mapping}_NAMES").update(entries)
        if hasattr(mapping := getattr(module, mapping), "_reverse_config_mapping"):
            mapping._reverse_config_mapping.update({_CONFIGS[kind]: kind for kind in entries})


class _RegisterAfterImport(MetaPathFinder):
    """Lets an auto module be imported as ever, then registers with it."""

    def find_spec(self, fullname, path, target=None):
        name = fullname.removeprefix(_AUTO)
        if name == fullname or name not in _ENTRIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register(name, module)

            spec.loader.exec_module = exec_module
        return spec
