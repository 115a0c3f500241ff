"""Watch a video piece by piece and ask while it goes on: frames are appended, nothing is encoded twice.

python examples/streaming.py runs/demo clip.mp4 "What has happened so far?"
"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba


path, video, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(path)
chat = vamba.VideoChat(model, processor)

# `read_video` yields frames as they are decoded; a camera would do as well
with processor.video_reader(video, chunk_frames=8) as reader:
    for chunk in reader:
        inputs = processor.video_processor(
            [chunk.frames], do_resize=False, cap_pixels_per_frame=False, return_tensors="pt"
        ).to(model.device)
        with torch.no_grad():
            chat.memory = model.encode_video(**inputs, memory=chat.memory)
        chat.reset()  # each time the same question, not a conversation
        print(f"{chunk.timestamps[-1]:6.1f} s: {chat.ask(question, max_new_tokens=32)}")
