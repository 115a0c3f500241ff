"""`import vamba`: quick, and known to everything in transformers that looks models up."""

import subprocess
import sys

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)
from transformers.models.auto import modeling_auto

import vamba
from vamba.modeling import VambaConfig, VambaForConditionalGeneration, VambaModel, VambaProcessor


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_in_nothing_heavy():
    heavy = "torch transformers numpy av mamba_ssm causal_conv1d PIL tqdm".split()
    assert python(f"import vamba, sys; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.parametrize(
    "order",
    [
        "import vamba; import transformers",
        "import transformers; import vamba",
        "from transformers import AutoModelForImageTextToText; import vamba; import transformers",
        "import transformers.generation; import vamba; import transformers",
    ],
)
def test_any_order_of_imports_will_do(order):
    code = f"""{order}
config = transformers.AutoConfig.for_model("vamba")
print(type(config).__name__, transformers.AutoModelForImageTextToText._model_mapping[type(config)].__name__)"""
    assert python(code) == "VambaConfig VambaForConditionalGeneration"


def test_every_public_name_is_there():
    for name in vamba.__all__:
        assert getattr(vamba, name) is not None
    assert set(vamba.__all__) <= set(dir(vamba))
    with pytest.raises(AttributeError, match="nonsense"):
        vamba.nonsense  # noqa: B018


def test_auto_classes_find_the_checkpoint(checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is VambaConfig
    assert type(AutoModel.from_pretrained(checkpoint)) is VambaModel
    assert type(AutoModelForImageTextToText.from_pretrained(checkpoint)) is VambaForConditionalGeneration
    assert type(AutoModelForMultimodalLM.from_pretrained(checkpoint)) is VambaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(checkpoint)) is VambaProcessor


def test_sub_configurations_are_known_too():
    assert {type(AutoConfig.for_model(kind)).__name__ for kind in ("vamba_text", "vamba_mamba2")} == {
        "VambaTextConfig",
        "VambaMamba2Config",
    }


def test_name_dictionaries_that_serve_and_pipelines_read():
    for names in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        assert names["vamba"] == "VambaForConditionalGeneration"
    assert modeling_auto.MODEL_MAPPING_NAMES["vamba"] == "VambaModel"


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_answer_about_a_video_path(checkpoint, clip, task):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    pipe = pipeline(task, model=model, processor=AutoProcessor.from_pretrained(checkpoint))
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What happens?"}]
    (output,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert output["generated_text"][-1]["role"] == "assistant"
    assert isinstance(output["generated_text"][-1]["content"], (str, list))
