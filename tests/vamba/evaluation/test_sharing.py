"""Ranks, here threads with a real store, share the questions about a video: each video is encoded by one of them."""

import threading
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from vamba.evaluation.sharing import Sharing


class Task:
    """lmms-eval's, of which a request has bound methods."""

    def to_messages(self, doc):
        return doc


@dataclass
class Request:
    arguments: tuple

    @property
    def args(self):
        return self.arguments


def request(doc, task="task", text="", of=Task()):  # noqa: B008
    return Request((text, of.to_messages, {"max_new_tokens": 2}, doc, task, "test"))


def video_of(request):
    return f"{request.args[3] // 3}.mp4"  # three questions in a row are about one video


def run(shares, calls=1, patience=60.0):
    """What each rank gets for its requests, `calls` times; and who encoded which video."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    encoded, results, failures = Counter(), [[] for _ in shares], []

    def answer(rank):
        def encode_and_ask(group):
            (video,) = {video_of(request) for request in group}
            encoded[rank, video] += 1
            return [f"{request.args[4]} {request.args[3]} {request.args[0]}" for request in group]

        return encode_and_ask

    def work(rank, requests):
        try:
            store = TCPStore("127.0.0.1", master.port, is_master=False, timeout=timedelta(seconds=20))
            sharing = Sharing(rank, len(shares), store, patience)
            for _ in range(calls):
                results[rank].append(sharing.answer("ask", requests, list(map(video_of, requests)), answer(rank)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=share) for share in enumerate(shares) if share[1] is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    return results, encoded


def expected(requests):
    return [f"{request.args[4]} {request.args[3]} {request.args[0]}" for request in requests]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("calls", [1, 2])
def test_each_video_is_encoded_once_by_all_ranks_and_answers_keep_their_order(ranks, calls):
    docs = [request(doc, text=f"text of {doc}") for doc in range(12)]
    shares = [docs[rank::ranks] for rank in range(ranks)]  # as lmms-eval deals them out
    results, encoded = run(shares, calls)
    assert results == [[expected(share)] * calls for share in shares]
    assert Counter(video for _, video in encoded.elements()) == {f"{video}.mp4": calls for video in range(4)}


def test_a_rank_that_has_everything_in_its_cache_is_not_waited_for_long():
    mine = [request(doc) for doc in (0, 2, 4)]
    results, encoded = run([mine, None], patience=0.2)
    assert results[0] == [expected(mine)] and encoded == {(0, "0.mp4"): 1, (0, "1.mp4"): 1}


def test_a_rank_answers_itself_what_no_other_knows_of():
    """Rank 1 has a task of its own about the same video; rank 0 cannot make such a request."""
    shares = [[request(0), request(1)], [request(2), request(2, task="other")]]
    results, _ = run(shares)
    assert results == [[expected(share)] for share in shares]


def test_repeated_and_padded_requests_are_each_answered():
    again = request(1)
    shares = [[again, again, again], [request(2)]]
    results, encoded = run(shares)
    assert results == [[expected(share)] for share in shares] and sum(encoded.values()) == 1


def test_a_rank_with_nothing_to_ask_delays_no_one():
    results, encoded = run([[request(0)], []])
    assert results == [[["task 0 "]], [[]]] and encoded == {(0, "0.mp4"): 1}


def test_what_agents_make_on_the_way_is_not_shared():
    made = [Request(("step", lambda doc: doc, {}, doc, "task", "test")) for doc in (0, 1)]
    results, encoded = run([made, [Request(("step", lambda doc: doc, {}, 2, "task", "test"))]])
    assert results[0] == [expected(made)] and encoded == {(0, "0.mp4"): 1, (1, "0.mp4"): 1}
