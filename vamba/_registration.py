"""Makes transformers' Auto classes, pipelines and `transformers serve` know Vamba and Video-Ma2mba.

What is unusual: `AutoModel.register` wants the classes themselves, which would import torch on `import vamba` (three
seconds). transformers' own models are listed by name instead and imported when asked for, from
`transformers.models.<type>`; we enter our names in the same dictionaries, which pipelines and `transformers serve` read
too, and `vamba.modeling` answers under that address. Where transformers' auto modules are not imported yet, the names
are entered right after they are.
"""

import importlib.abc
import importlib.machinery
import sys

from . import modeling


_AUTO = "transformers.models.auto."
_ADDRESS = "transformers.models.vamba"

# auto module -> (dictionary of names, mapping that reads it, {model type: class name})
_MODELS = {"vamba": "VambaForConditionalGeneration", "video_ma2mba": "VideoMa2mbaForConditionalGeneration"}
_IMAGE_PROCESSORS = {"torchvision": "Qwen2VLImageProcessor", "pil": "Qwen2VLImageProcessorPil"}
_VIDEO_PROCESSORS = {"torchvision": "Qwen2VLVideoProcessor"}
_ENTRIES = {
    "configuration_auto": [
        (
            "CONFIG_MAPPING_NAMES",
            "CONFIG_MAPPING",
            {
                "vamba": "VambaConfig",
                "vamba_text": "VambaTextConfig",
                "vamba_mamba2": "VambaMamba2Config",
                "video_ma2mba": "VideoMa2mbaConfig",
                "video_ma2mba_text": "VideoMa2mbaTextConfig",
                "video_ma2mba_vision": "VideoMa2mbaVisionConfig",
            },
        ),
    ],
    "modeling_auto": [
        (
            "MODEL_MAPPING_NAMES",
            "MODEL_MAPPING",
            {"vamba": "VambaModel", "vamba_text": "VambaTextModel", "video_ma2mba": "VideoMa2mbaModel"},
        ),
        ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", _MODELS),
        ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING", _MODELS),
    ],
    "processing_auto": [
        (
            "PROCESSOR_MAPPING_NAMES",
            "PROCESSOR_MAPPING",
            {"vamba": "VambaProcessor", "video_ma2mba": "VideoMa2mbaProcessor"},
        )
    ],
    "tokenization_auto": [
        (
            "TOKENIZER_MAPPING_NAMES",
            "TOKENIZER_MAPPING",
            {"vamba": "Qwen2Tokenizer", "video_ma2mba": "GPTNeoXTokenizer"},
        )
    ],
    "image_processing_auto": [
        (
            "IMAGE_PROCESSOR_MAPPING_NAMES",
            "IMAGE_PROCESSOR_MAPPING",
            {"vamba": _IMAGE_PROCESSORS, "video_ma2mba": _IMAGE_PROCESSORS},
        )
    ],
    "video_processing_auto": [
        (
            "VIDEO_PROCESSOR_MAPPING_NAMES",
            "VIDEO_PROCESSOR_MAPPING",
            {"vamba": _VIDEO_PROCESSORS, "video_ma2mba": _VIDEO_PROCESSORS},
        )
    ],
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
    configs = _ENTRIES["configuration_auto"][0][2]
    if name == "configuration_auto":
        module.SPECIAL_MODEL_TYPE_TO_MODULE_NAME.update(dict.fromkeys(configs, "vamba"))
    for names, mapping, entries in _ENTRIES[name]:
        getattr(module, names).update(entries)
        mapping = getattr(module, mapping)
        if hasattr(mapping, "_reverse_config_mapping"):
            mapping._reverse_config_mapping.update({configs[kind]: kind for kind in entries})


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets an auto module be imported as ever, then registers with it."""

    def find_spec(self, fullname, path, target=None):
        name = fullname.removeprefix(_AUTO)
        if name == fullname or name not in _ENTRIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._wrap(spec.loader, name)
        return spec

    @staticmethod
    def _wrap(loader, name: str) -> None:
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            _register(name, module)

        loader.exec_module = exec_module
