"""Evaluation: questions about videos, asked as benchmarks ask them, scored, reported and compared.

`questions` reads them from files; `protocols` says how a benchmark asks; `asking` is the engine, which encodes each
video once; `choices` finds out what a reply means; `scoring` counts; `run` is `vamba eval`, with ranks and resuming.
Importing this package imports nothing heavy.
"""
