"""What the tests of the benchmarks share: a script of benchmarks/, run in this process as from its command line."""

import runpy
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run_script(monkeypatch):
    def run(name: str, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(BENCHMARKS)  # where a script finds its modules
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")

    return run
