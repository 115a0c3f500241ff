"""Ask a model whose weights bitsandbytes keeps in 4 or 8 bits: a quarter or half of the memory, and somewhat slower.

    python examples/quantized.py runs/demo clip.mp4 "What happens?" 4

`vamba ask --load-in-4bit` and `--load-in-8bit` do the same. `from_pretrained` takes the quantisation as well;
`load_model` also checks the weights, and leaves out layers that bitsandbytes does not take on a CPU.
"""

import sys

import torch
from transformers import AutoProcessor

import vamba
from vamba.loading import load_model, quantization


path, video, question, bits = sys.argv[1:]
how = quantization(load_in_4bit=bits == "4", load_in_8bit=bits == "8")  # a BitsAndBytesConfig
model = load_model(path, dtype=torch.bfloat16, device_map="auto", quantization_config=how)
processor = AutoProcessor.from_pretrained(path)
print(f"{model.get_memory_footprint() / 2**20:,.1f} MiB of weights")

chat = vamba.VideoChat(model, processor)
chat.watch(video)
print(chat.ask(question, max_new_tokens=32))
