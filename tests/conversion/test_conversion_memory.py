"""A conversion's memory does not grow with the model: measured in a process of its own."""

import json
import subprocess
import sys

import pytest


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from vamba.conversion import convert
from vamba.conversion.configs import config_from_qwen2_vl
from vamba.conversion.formats import expected_shapes
from vamba.conversion.safetensors_io import write_files
from vamba.conversion.planning import Step

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

folder = Path(sys.argv[1])
text = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=8,
            num_key_value_heads=2, vocab_size=16384, eos_token_id=2, bos_token_id=1)
vision = dict(embed_dim=64, depth=1, num_heads=2, hidden_size=512, mlp_ratio=2)
config = Qwen2VLConfig(text_config=text, vision_config=vision)
with torch.device("meta"):
    state = Qwen2VLForConditionalGeneration(config).state_dict()
names = {key: key.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for key in state}
steps = [Step(names[key], tuple(tensor.shape), torch.float32, None) for key, tensor in state.items()]
(folder / "source").mkdir()
config.save_pretrained(folder / "source")
write_files(folder / "source", steps, lambda step: torch.ones(step.shape))
expected_shapes(config_from_qwen2_vl(json.loads((folder / "source" / "config.json").read_text())))  # imports the model

for dtype, shard in ((None, "5GB"), ("bfloat16", "20MB")):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    ours = convert(folder / "source", folder / shard, dtype=dtype, max_shard_size=shard, progress=False)
    print(json.dumps(dict(
        peak=memory("VmHWM") - before,
        largest=max(step.nbytes for step in steps),
        source=sum(step.nbytes for step in steps),
        files=len(list(ours.glob("*.safetensors"))),
    )))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_peak_is_a_small_multiple_of_the_largest_tensor(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, cast = map(json.loads, done.stdout.splitlines())
    assert kept["source"] > 8 * kept["largest"] and kept["files"] == 1 and cast["files"] > 5
    assert kept["peak"] < 2 * kept["largest"], kept
    assert cast["peak"] < 2.5 * cast["largest"], cast  # as read and as cast
