"""Encode a video once, keep it in a file, and ask it several questions as one batch.

python examples/ask_many.py runs/demo clip.mp4 "What happens?" "What comes first?"
"""

import os
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba


path, video, *questions = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(path)
processor.tokenizer.padding_side = "left"

saved = os.path.splitext(video)[0] + ".memory.safetensors"
if os.path.exists(saved):
    memory = vamba.VideoMemory.load(saved, device=model.device)
else:
    memory = vamba.VideoChat(model, processor).watch(video)
    memory.save(saved)
print(f"{memory.video_length} video tokens, {memory.video_nbytes / 2**20:.1f} MiB")

# every row of the batch reads the one video; nothing of it is copied
prompts = [
    processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    for question in questions
]
inputs = processor.tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
answers = model.generate(**inputs, past_key_values=memory.fork(), max_new_tokens=128)
for question, answer in zip(questions, answers[:, inputs["input_ids"].shape[1] :]):
    print(f"> {question}\n{processor.decode(answer, skip_special_tokens=True)}")
