"""Ask a question about a video, with nothing but transformers' own interface.

python examples/quickstart.py runs/demo clip.mp4 "What happens?"
"""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba  # noqa: F401  makes the Auto classes know Vamba


path, video, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(path)

messages = [
    {
        "role": "user",
        "content": [{"type": "video", "video": video}, {"type": "text", "text": question}],
    }
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
