"""Questions about one video, asked in several processes, answered in one of them: each video is encoded once.

lmms-eval deals documents out in turn, so every rank holds some of a video's questions. Each says in a store of
key-value pairs what it asks; then whoever is free claims the next video, answers the questions of all ranks about it,
and leaves the answers in the store. What is unusual: nothing here is a collective operation, as a rank whose answers
all come from lmms-eval's cache does not get here, and must not be waited for. What no one answered for a rank, it
answers itself. A long video therefore delays no one but who claimed it, and two ranks give one rank's answers.
"""

import copy
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.distributed import TCPStore


PATIENCE = 60.0  # seconds for the other ranks to say what they ask; they come here together, or not at all
FOREVER = timedelta(days=30)  # for an answer: the launcher ends all ranks if one dies


def meet(rank: int, world_size: int) -> TCPStore | None:
    """The store of all ranks, which all have to call this; None for one rank."""
    if world_size == 1:
        return None
    host, options = os.environ.get("MASTER_ADDR", "127.0.0.1"), {"wait_for_workers": False, "timeout": FOREVER}
    store = TCPStore(host, 0, is_master=True, **options) if rank == 0 else None
    (port,) = broadcast_object_list([store.port if store else None])
    return store or TCPStore(host, port, is_master=False, **options)


class Sharing:
    """The ranks of a run. `answer` is called by each with its own requests; with one rank it only groups them."""

    def __init__(self, rank: int = 0, world_size: int = 1, store: TCPStore | None = None, patience: float = PATIENCE):
        self.rank, self.world_size, self.store, self.patience = rank, world_size, store, patience
        self.calls: Counter = Counter()

    def answer(self, kind: str, requests: Sequence, keys: Sequence[str | None], answer: Callable[[list], list]) -> list:
        """What `answer` says, called with requests of one key at a time, in the order of `requests`.

        Args:
            kind: of all these requests, on all ranks.
            requests: with `args`, in which texts and numbers say what is asked and the rest depends on the task only.
            keys: of each, what has to be watched for it; None for what cannot be shared.
            answer: from requests to what JSON can hold, one each.
        """
        groups: dict[str | None, list[int]] = {}
        for index, key in enumerate(keys):
            groups.setdefault(key, []).append(index)
        shared = self.world_size > 1 and all(map(_is_of_a_task, requests))
        elsewhere: dict[Any, dict[str, Any]] = self._share(kind, requests, groups, answer) if shared else {}
        results: list[Any] = [None] * len(requests)
        names = _names(requests)
        for key, indices in groups.items():
            found = elsewhere.get(key, {})
            left = [index for index in indices if names[index] not in found]
            said = dict(zip(left, answer([requests[index] for index in left]) if left else []))
            for index in indices:
                results[index] = said[index] if index in said else found[names[index]]
        return results

    def _share(self, kind: str, requests: Sequence, groups: dict, answer: Callable) -> dict[str, dict[str, Any]]:
        """Answers of all ranks to the requests of this one, by key and name."""
        assert self.store is not None  # as there are several ranks
        self.calls[kind] += 1
        call, names = f"{kind}/{self.calls[kind]}", _names(requests)
        mine = {key: [names[index] for index in indices] for key, indices in groups.items() if key is not None}
        self.store.set(f"{call}/asks/{self.rank}", json.dumps(mine))
        like = {_task_of(request): request for request in requests}
        answers: dict[str, dict[str, Any]] = {}
        for key, asked in self._asked_by_all(call).items():
            asked = [name for name in asked if _task_of_name(name) in like]
            if not asked or self.store.add(f"{call}/claims/{_short(key)}", 1) > 1:
                continue
            answers[key] = dict(zip(asked, answer([_request(name, like) for name in asked])))
            self.store.set(f"{call}/answers/{_short(key)}", json.dumps(answers[key]))
        for key in mine.keys() - answers.keys():
            place = f"{call}/answers/{_short(key)}"
            self.store.wait([place], FOREVER)
            answers[key] = json.loads(self.store.get(place))
        return answers

    def _asked_by_all(self, call: str) -> dict[str, list[str]]:
        """Names of what is asked, by key, of all ranks that say so in time."""
        assert self.store is not None
        deadline = time.monotonic() + self.patience
        everything: dict[str, list[str]] = {}
        for rank in range(self.world_size):
            place = f"{call}/asks/{rank}"
            while not (is_there := self.store.check([place])) and time.monotonic() < deadline:
                time.sleep(0.05)
            for key, names in json.loads(self.store.get(place)).items() if is_there else ():
                everything[key] = list(dict.fromkeys([*everything.get(key, []), *names]))
        return everything


def _names(requests: Sequence) -> list[str]:
    """A name for each request, by which another rank can make it anew; requests that are repeated are numbered."""
    seen: Counter = Counter()
    names = []
    for request in requests:
        said = [argument if isinstance(argument, (str, int)) else None for argument in request.args]
        seen[text := json.dumps(said)] += 1
        names.append(json.dumps([said, seen[text]]))
    return names


def _request(name: str, like: dict) -> Any:
    """The request of this name, made from one of the same task."""
    said, _ = json.loads(name)
    request = copy.copy(like[_task_of_name(name)])
    request.arguments = tuple(own if text is None else text for text, own in zip(said, request.args))
    return request


def _task_of(request: Any) -> tuple:
    return tuple(request.args[-2:])


def _task_of_name(name: str) -> tuple:
    return tuple(json.loads(name)[0][-2:])


def _is_of_a_task(request: Any) -> bool:
    """Whether the functions in a request are the task's own, and not made on the way, as those of agents are."""
    return any(getattr(argument, "__self__", None) is not None for argument in request.args)


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
