"""Evaluation: questions about videos, asked as benchmarks ask them, scored, reported and compared.

`questions` reads them from files; `protocols` says how a benchmark asks; `asking` is the engine, which encodes each
video once; `choices` finds out what a reply means; `scoring` counts; `runner` is `vamba eval`, on one process or many;
`run_folder` keeps its answers and `report` shows them. `needles` makes videos and questions where there are none.
Importing this package imports nothing heavy.
"""

import importlib


_HOMES = {
    "PROTOCOLS": ".protocols",
    "Answer": ".asking",
    "Protocol": ".protocols",
    "Question": ".questions",
    "answer_questions": ".asking",
    "evaluate": ".runner",
    "make_needles": ".needles",
    "read_questions": ".questions",
    "summarize": ".scoring",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
