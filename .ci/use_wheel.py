"""Run by check_wheel in a fresh environment: is the installed wheel whole, and does it work without the checkout?"""

import subprocess
import sys
import tempfile
from pathlib import Path

import vamba


checkout = Path(sys.argv[1]).resolve()
home = Path(vamba.__file__).resolve()
assert checkout not in home.parents, f"vamba was imported from the checkout: {home}"
assert "torch" not in sys.modules, "import vamba must not import torch"

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from vamba.conversion import convert  # noqa: E402
from vamba.demo.tiny_checkpoints import MIXER, make_tiny_qwen2_vl  # noqa: E402


with tempfile.TemporaryDirectory() as folder:
    qwen, converted = Path(folder) / "qwen", Path(folder) / "vamba"
    make_tiny_qwen2_vl(qwen)
    convert(qwen, converted, mamba_config=MIXER, progress=False)
    assert "image-text-to-text" in (converted / "README.md").read_text(), "the model card is missing"
    model = AutoModelForImageTextToText.from_pretrained(converted)
    processor = AutoProcessor.from_pretrained(converted)
    assert type(model).__module__ == "vamba.modeling.modeling_vamba", type(model).__module__
    assert type(processor).__name__ == "VambaProcessor", type(processor)
from vamba.evaluation import tasks  # noqa: E402
from vamba.training import load_recipe, shipped_recipes  # noqa: E402


assert "vamba_stage1" in shipped_recipes(), "the recipes are missing"
assert all(load_recipe(name) for name in shipped_recipes())
assert list(Path(tasks.__file__).parent.glob("*.yaml")), "the tasks for lmms-eval are missing"
vamba_command = Path(sys.executable).with_name("vamba")
assert "ask" in subprocess.run([vamba_command, "--help"], capture_output=True, text=True, check=True).stdout
