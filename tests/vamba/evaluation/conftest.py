"""Videos to be asked about, and questions about them."""

import json
import shutil

import pytest


OPTIONS = ["red", "green", "blue", "yellow"]


@pytest.fixture(scope="session")
def asked(tmp_path_factory, clip):
    """A file of nine questions about four videos, one of which cannot be read; two are open, of one nobody knows the
    answer."""
    folder = tmp_path_factory.mktemp("asked")
    rows = []
    for number in range(3):
        shutil.copy(clip, folder / f"{number}.mp4")
        for kind, text in (("colour", "Which colour is it?"), ("place", "Where is it?")):
            row = {"id": f"{kind}{number}", "video": f"{number}.mp4", "question": text, "category": kind}
            rows.append(row | {"options": OPTIONS, "answer": "ABCD"[number]})
    (folder / "broken.mp4").write_bytes(b"no video")
    rows.append(rows[0] | {"id": "broken", "video": "broken.mp4"})
    rows.append({"id": "open", "video": "0.mp4", "question": "What happens?", "answer": "nothing", "end": 1})
    rows.append({"id": "unknown", "video": "1.mp4", "question": "What happens?"})
    path = folder / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
