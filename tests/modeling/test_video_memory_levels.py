"""Buffers of keys and values: what is read is what was appended, whoever shares the buffer."""

import threading

import pytest
import torch

from vamba.modeling.video_memory import FP8, LevelStore, VideoLevel


def level(length, start=0, dtype=torch.float32):
    keys = torch.arange(start, start + length, dtype=dtype).view(1, 1, -1, 1).expand(2, 3, -1, 4).clone()
    return VideoLevel(keys, -keys)


def numbers(store):
    read = store.read()
    assert torch.equal(read.values_BHMP, -read.keys_BHMP)
    return read.keys_BHMP[1, 2, :, 3].tolist()


@pytest.mark.parametrize("expected", [0, 5, 100])
def test_chunks_are_read_in_order(expected):
    store = LevelStore()
    for start in range(0, 60, 6):
        store.append(level(6, start), expected)
        assert store.length == start + 6 and numbers(store) == list(range(start + 6))


def test_one_chunk_is_not_copied():
    store, only = LevelStore(), level(6)
    store.append(only, expected=6)
    assert store.read().keys_BHMP.data_ptr() == only.keys_BHMP.data_ptr()


def test_room_that_was_expected_is_made_once():
    store, places = LevelStore(), set()
    for start in range(0, 60, 6):
        store.append(level(6, start), expected=60)
        places.add(store.read().keys_BHMP.data_ptr())
    assert len(places) == 1
    assert store.read().keys_BHMP.untyped_storage().nbytes() == 60 * 2 * 3 * 4 * 4


def test_what_was_not_expected_is_made_room_for_in_strides():
    """Each encode announces its own tokens only; copying everything for each of them would be quadratic."""
    store, places = LevelStore(), set()
    for start in range(0, 600, 6):
        store.append(level(6, start), expected=start + 6)
        places.add(store.read().keys_BHMP.data_ptr())
    assert numbers(store) == list(range(600)) and len(places) < 25


def test_forks_that_both_go_on_do_not_meet():
    store = LevelStore()
    store.append(level(3), expected=100)
    first, second = store.fork(), store.fork()
    first.append(level(3, 3), expected=100)  # into the shared buffer
    second.append(level(3, 50), expected=100)  # which holds another's tokens by now
    assert first.read().keys_BHMP.data_ptr() == store.read().keys_BHMP.data_ptr()
    store.append(level(1, 99), expected=100)
    assert numbers(first) == [0, 1, 2, 3, 4, 5]
    assert numbers(second) == [0, 1, 2, 50, 51, 52]
    assert numbers(store) == [0, 1, 2, 99]


def test_of_forks_that_go_on_at_the_same_time_one_writes_into_the_shared_buffer():
    for _ in range(5):
        length = 30_000  # numbers enough that the threads meet while they are written
        store, barrier = LevelStore(), threading.Barrier(2)
        store.append(level(3), expected=2 * length)
        forks = [store.fork(), store.fork()]
        chunks = [level(length, 10), level(length, 60_000)]

        def go_on(fork, chunk, barrier=barrier, length=length):
            barrier.wait()
            fork.append(chunk, expected=2 * length)

        threads = [threading.Thread(target=go_on, args=pair) for pair in zip(forks, chunks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for fork, chunk in zip(forks, chunks):
            assert torch.equal(fork.read().keys_BHMP[:, :, 3:], chunk.keys_BHMP)


@pytest.mark.parametrize("expected", [0, 100])
def test_truncated_stores_go_on_by_themselves(expected):
    store = LevelStore()
    store.append(level(4), expected)
    store.append(level(4, 4), expected)
    fork = store.fork()
    store.truncate(3)
    store.append(level(2, 50), expected)
    assert numbers(store) == [0, 1, 2, 50, 51] and numbers(fork) == list(range(8))
    store.truncate(0)
    assert store.length == 0
    store.append(level(2, 7), expected)
    assert numbers(store) == [7, 8] and numbers(fork) == list(range(8))


def test_fp8_and_other_devices_are_stored_as_they_are():
    store = LevelStore()
    for start in (0, 3):
        store.append(level(3, start).stored_as(FP8), expected=10)
    read = store.read()
    assert read.keys_BHMP.dtype == FP8 and read.key_scales_BHM.shape == (2, 3, 6)
    assert read.stored_as(torch.float32).keys_BHMP[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]
    store.map(lambda stored: stored.stored_as(torch.float64))
    store.append(level(2, 6, torch.float64))
    assert numbers(store) == list(range(8))


def test_gradients_reach_every_chunk():
    store = LevelStore()
    chunks = [level(3, start).map(lambda t: t.requires_grad_()) for start in (0, 3)]
    for chunk in chunks:
        store.append(chunk, expected=10)
    assert numbers(store) == list(range(6))
    store.read().keys_BHMP.sum().backward()
    assert all(torch.equal(chunk.keys_BHMP.grad, torch.ones(2, 3, 3, 4)) for chunk in chunks)


def test_a_chunk_with_gradients_lies_outside_the_buffer_that_forks_write_on():
    store = LevelStore()
    store.append(level(3), expected=100)
    fork = store.fork()
    store.append(level(3, 3).map(lambda t: t.requires_grad_()), expected=100)
    fork.append(level(3, 50), expected=100)  # where the chunk above would lie
    with torch.no_grad():
        store.append(level(3, 6), expected=100)
    assert numbers(store) == list(range(9)) and numbers(fork) == [0, 1, 2, 50, 51, 52]
