"""A data worker that dies of an example is replaced, and everything goes on as if the example were a broken one."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vamba.data import ABOUT, Collator, ConversationEncoder, ExampleError, Mixture, Position, Source, TrainingStream


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """torch looks every 5 seconds whether its workers live; here it looks sooner."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


class Hostile(ConversationEncoder):
    """One example crashes as it is planned and another as it is decoded, if not at once, as a decoder of C would."""

    crashes = True

    def plan(self, example, media_root=None):
        plan = super().plan(example, media_root)
        if example["id"] == "v4":
            self._fail()
        plan.messages[0]["id"] = example["id"]
        return plan

    def encode(self, plan):
        if plan.messages[0].pop("id") == "v6":
            self._fail()
        return super().encode(plan)

    def _fail(self):
        if not self.crashes:
            raise ExampleError("it is broken")
        os.kill(os.getpid(), signal.SIGSEGV)


def make_stream(processor, dataset, crashes=True, **options):
    encoder = Hostile(processor, fps=4)
    encoder.crashes = crashes
    return TrainingStream(Mixture([Source(dataset, shuffle=False)]), Collator(encoder), rows=2, **options)


def test_a_worker_that_dies_of_an_example(processor, dataset):
    expected = [batch for _, batch in zip(range(10), make_stream(processor, dataset, crashes=False).loader(2))]
    stream = make_stream(processor, dataset)
    position, found = Position(stream, 2), []
    for batch in stream.loader(2, prefetch_factor=4):  # so both are met before a first batch comes, one after the other
        time.sleep(0.1)  # where nothing is raised, as it would be in the middle of a step, when a worker dies
        found.append(batch)
        position.advance(batch[ABOUT])
        if len(found) == 6:
            place = json.loads(json.dumps(position.state()))
        if len(found) == 10:
            break
    resumed = make_stream(processor, dataset, position=place)
    rest = [batch for _, batch in zip(range(4), resumed.loader(2))]
    assert len(place["crashed"]) == 2 and not any("SIGSEGV" not in crash[3] for crash in place["crashed"])
    for one, two in zip(found + rest, expected + expected[6:], strict=True):
        assert one[ABOUT].samples == two[ABOUT].samples and len(one[ABOUT].skipped) == len(two[ABOUT].skipped)
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert torch.equal(one["pixel_values_videos"], two["pixel_values_videos"])
    told = {message for batch in found for message in batch[ABOUT].skipped}
    assert told == {f"train.jsonl#v{n}: a data worker died of it (SIGSEGV)" for n in (4, 6)}


def test_workers_that_die_in_one_pass(processor, dataset):
    """Each pass is whole, and tells of the same examples."""
    stream = make_stream(processor, dataset, once=True)
    for _ in range(2):
        abouts = [batch[ABOUT] for batch in stream.loader(2)]
        assert sorted(name for about in abouts for name in about.samples) == sorted(
            f"train.jsonl#v{n}" for n in range(12) if n not in (4, 6)
        )
        assert sum(len(about.skipped) for about in abouts) == 2


def test_a_worker_that_dies_of_nothing_is_an_error(processor, dataset):
    stream = make_stream(processor, dataset, crashes=False)
    batches = iter(stream.loader(1))
    next(batches)
    stream.notes.zero_()
    (worker,) = multiprocessing.active_children()
    while True:
        if not stream.notes.any():  # the queue is full, and it waits
            worker.kill()
            break
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        for _ in range(5):
            next(batches)
