"""Talk about what a camera sees while it goes on: frames are appended as they come, and nothing is encoded twice.

    python examples/live_camera.py runs/demo /dev/video0
    python examples/live_camera.py runs/demo rtsp://camera/stream

Type a question and Enter whenever you like; Ctrl-C ends it. A file will do as well as a camera. Two threads read camera
and keyboard, and this one does all that needs the model; frames that come while it is busy may be lost. The memory of a
Vamba grows with every frame, that of a Video-Ma2mba does not.
"""

import queue
import sys
import threading

import av
import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba


path, source = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(path)
chat = vamba.VideoChat(model, processor)
fps = getattr(processor.video_processor, "fps", None) or 1.0  # as the model was trained
events: queue.Queue = queue.Queue(maxsize=2)


def read_camera(frames_at_once: int = 4) -> None:
    try:
        frames, due = [], 0.0
        with av.open(source, format="v4l2" if source.startswith("/dev/video") else None) as camera:
            for frame in camera.decode(video=0):
                if frame.time >= due:
                    frames.append(frame.to_ndarray(format="rgb24"))
                    due = max(due, frame.time) + 1 / fps
                if len(frames) == frames_at_once:
                    events.put(("frames", np.stack(frames)))
                    frames = []
        if frames:
            events.put(("frames", np.stack(frames)))
    finally:  # also if the camera is unplugged
        events.put(("over", "camera"))


def read_keyboard() -> None:
    for line in sys.stdin:
        if line.strip():
            events.put(("question", line.strip()))
    events.put(("over", "keyboard"))


running, questions = {"camera", "keyboard"}, []
for thread in (read_camera, read_keyboard):
    threading.Thread(target=thread, daemon=True).start()
while running:
    kind, what = events.get()
    if kind == "over":
        running.remove(what)
    elif kind == "question":
        questions.append(what)
    else:
        going_on = chat.memory is not None
        chat.watch(what, append=True, continue_video=going_on, fps=fps, progress=False)
    while questions and chat.memory is not None:
        print(">", question := questions.pop(0))
        for piece in chat.ask(question, stream=True, max_new_tokens=64):
            print(piece, end="", flush=True)
        print()
print("nothing was seen" if chat.memory is None else f"{chat.memory.seconds:.1f} seconds were watched")
