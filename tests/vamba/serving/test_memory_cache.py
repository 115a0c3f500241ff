"""What is kept where, that nothing is encoded twice, and that answers do not depend on it."""

import errno
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba
from vamba.chat import MEMORIES
from vamba.serving.memory_cache import MemoryCache, keys_of


@pytest.fixture(scope="module", params=["checkpoint", "ma2mba"])
def chat(request):
    folder = request.getfixturevalue(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return vamba.VideoChat(model, AutoProcessor.from_pretrained(folder))


@pytest.fixture
def watch(chat, clip):
    """Encodes so many frames of the clip, and counts how often."""

    def watch(frames):
        watch.calls.append(frames)
        return chat.watch(clip, num_frames=frames, progress=False)

    watch.calls = []
    return watch


def make(chat, **options):
    return MemoryCache(MEMORIES[chat.model.config.model_type], "cpu", **options)


def ask(chat, memory):
    chat.memory = memory
    chat.reset()
    return chat.ask("What happens?", max_new_tokens=4, do_sample=False)


def get(cache, key, encode):
    """A memory and whether it was kept, as the server comes by it."""
    memory, known = cache.longest([key])
    if not known:
        cache.keep(key, memory := encode())
    return memory.fork(), bool(known)


def test_a_memory_is_encoded_once_and_forks_of_it_are_independent(chat, watch):
    cache = make(chat)
    expected = ask(chat, watch(4))
    first, found = get(cache, "a", lambda: watch(4))
    assert not found and ask(chat, first) == expected
    chat.memory = first
    chat.watch(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), append=True, progress=False)  # of this fork only
    again, found = get(cache, "a", lambda: watch(4))
    assert found and again.video_length == first.video_length and ask(chat, again) == expected
    assert watch.calls == [4, 4] and cache.counts.cpu == 1


def test_the_longest_memory_of_the_first_media_is_found(chat, watch, tmp_path):
    cache = make(chat, folder=tmp_path)
    for key, frames in (("a", 2), ("ab", 4)):
        cache.keep(key, watch(frames))
    cache.close()
    cache = make(chat, folder=tmp_path)
    memory, count = cache.longest(["a", "ab", "abc"])
    assert count == 2 and memory.video_length == watch(4).video_length and cache.counts.disk == 1
    assert cache.longest(["x", "xy"]) == (None, 0) and cache.find("a") is None and cache.longest(["a"])[1] == 1


def test_the_least_recently_used_goes_first(chat, watch):
    size = watch(4).video_nbytes
    cache = make(chat, cpu_bytes=2 * size + size // 2)
    for key in ("a", "b", "a", "c"):
        get(cache, key, lambda: watch(4))
    assert cache.sizes() == {"gpu": 0, "cpu": 2 * size, "disk": 0} and cache.counts.dropped == 1
    watch.calls.clear()
    assert get(cache, "a", lambda: watch(4))[1] and get(cache, "c", lambda: watch(4))[1]
    assert not get(cache, "b", lambda: watch(4))[1] and watch.calls == [4]


def test_one_that_no_budget_holds_is_answered_all_the_same(chat, watch):
    cache = make(chat, cpu_bytes=1)
    assert ask(chat, get(cache, "a", lambda: watch(4))[0]) == ask(chat, watch(4))
    assert cache.sizes()["cpu"] == 0


def test_a_server_that_was_killed_has_them_again(chat, watch, tmp_path):
    cache = make(chat, folder=tmp_path)
    expected = ask(chat, get(cache, "a", lambda: watch(4))[0])
    cache.close()
    again = make(chat, folder=tmp_path)
    memory, found = get(again, "a", lambda: watch(4))
    assert found and ask(chat, memory) == expected and watch.calls == [4] and again.counts.disk == 1


def test_a_damaged_file_is_encoded_again(chat, watch, tmp_path):
    cache = make(chat, folder=tmp_path)
    get(cache, "a", lambda: watch(4))
    cache.close()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    memory, found = get(make(chat, folder=tmp_path), "a", lambda: watch(4))
    assert not found and watch.calls == [4, 4]


def test_a_damaged_file_that_cannot_be_deleted_is_encoded_again(chat, watch, tmp_path, monkeypatch):
    cache = make(chat, folder=tmp_path)
    get(cache, "a", lambda: watch(4))
    cache.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    _, found = get(make(chat, folder=tmp_path), "a", lambda: watch(4))
    assert not found and watch.calls == [4, 4]


def test_the_disk_keeps_to_its_budget(chat, watch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a checkpoint's, which is not ours to delete")
    cache = make(chat, folder=tmp_path)
    get(cache, "a", lambda: watch(4))
    cache.close()
    size = cache.sizes()["disk"]
    cache = make(chat, folder=tmp_path, disk_bytes=2 * size + size // 2)
    for key in ("b", "c"):
        time.sleep(0.02)
        get(cache, key, lambda: watch(4))
    cache.close()
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"b", "c", "model"}


def test_keys_tell_content_sampling_and_weights_apart():
    keys = {
        keys_of(*given)[-1] for given in (("w", ["a"], {"fps": 1}), ("w", ["a"], {"fps": 2}), ("v", ["a"], {"fps": 1}))
    }
    assert len(keys) == 3 and keys_of("w", ["a"], {"fps": 1, "end": 2}) == keys_of("w", ["a"], {"end": 2, "fps": 1})
    both = keys_of("w", ["a", "b"], {})
    assert both[0] == keys_of("w", ["a"], {})[0] and both[1] != keys_of("w", ["b", "a"], {})[1]
