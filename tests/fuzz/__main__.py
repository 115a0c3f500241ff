"""`make fuzz`: broken and hostile input, case after case, each in a child with limits.

    python tests/fuzz --seconds 120             as many cases as end in that time
    python tests/fuzz --cases 10000             so many
    python tests/fuzz --repeat images:1234      one case again, with all that it says

A case is a kind and a number, from which all that is random in it follows. Exit code 1 if any case fails.
"""

import argparse
import collections
import json
import os
import random
import selectors
import sys
import tempfile
import time
import traceback
from pathlib import Path


os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
os.environ["SVT_LOG"] = "0"
_home = tempfile.TemporaryDirectory(prefix="fuzz-")
os.environ["HF_HOME"] = _home.name  # where `datasets` keeps its tables

from tqdm import tqdm  # noqa: E402


# Of errors by others no subclass is accepted: a UnicodeDecodeError tells nobody what to do.
ACCEPTED = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError)
tqdm.monitor_interval = 0  # its thread would be in the way of forking


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="stop after this time; default: 120")
    parser.add_argument("--cases", type=int, help="run so many cases, however long it takes")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other cases; default: 0")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: one for each core")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these kinds of cases")
    parser.add_argument("--repeat", nargs="+", metavar="KIND:NUMBER", help="these cases again, telling how they end")
    parser.add_argument("--materials", type=Path, help="a folder to keep the sound inputs in, made if it is not there")
    arguments = parser.parse_args()
    tempfile.tempdir = _home.name
    materials = arguments.materials or Path(_home.name) / "materials"
    if not materials.is_dir():
        _in_child(_make, materials)
    return _run(arguments, materials)


def _make(materials: Path) -> None:
    from materials import make

    make(materials)


def _in_child(function, *arguments) -> None:
    """Computes in a process of its own, as one that has computed has threads and cannot be forked."""
    if (child := os.fork()) == 0:
        try:
            function(*arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        sys.exit("the sound inputs could not be made")


def _run(arguments, materials: Path) -> int:
    from cases import KINDS, load

    load(materials)
    if arguments.repeat:
        verdicts = [(case, _case(*case.split(":"), materials)) for case in arguments.repeat]
        for case, verdict in verdicts:
            print(f"{case}: {verdict.outcome}, {verdict.seconds:.1f} s, {verdict.peak / 2**20:.0f} MiB")
            print(verdict.text, end="\n\n")
        return int(not all(verdict.passed for _, verdict in verdicts))
    kinds = arguments.kinds or list(KINDS)
    weights = [KINDS[kind][1] for kind in kinds]
    deadline = None if arguments.cases else time.monotonic() + arguments.seconds
    readers = [_start(index, arguments, materials, kinds, weights, deadline) for index in range(arguments.workers)]
    table = collections.defaultdict(
        lambda: {"cases": 0, "result": 0, "refused": 0, "failed": 0, "slowest": 0.0, "peak": 0}
    )
    failures = []
    with tqdm(total=arguments.cases, unit="case", desc="fuzzing", disable=not sys.stderr.isatty()) as bar:
        for kind, number, verdict in _verdicts(readers):
            row = table[kind]
            row["cases"] += 1
            row[verdict["outcome"] if verdict["outcome"] in row else "failed"] += 1
            row["slowest"], row["peak"] = max(row["slowest"], verdict["seconds"]), max(row["peak"], verdict["peak"])
            if verdict["outcome"] not in row:
                failures.append((f"{kind}:{number}", verdict))
                bar.write(f"FAILED {kind}:{number} {verdict['outcome']}: {verdict['text'].strip()[-600:]}\n")
            bar.update()
    _report(table, failures)
    return int(bool(failures) or not table)


def _case(kind: str, number: str, materials: Path):
    from cases import KINDS
    from children import run_case

    rng, prepare = random.Random(f"{kind} {number}"), KINDS[kind][0]
    return run_case(lambda folder: prepare(rng, materials, folder), accepted=ACCEPTED)


def _start(index: int, arguments, materials: Path, kinds, weights, deadline) -> int:
    """A process that forks the cases index, index + workers, ..., and writes a line for each; the end to read from."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        return read
    os.close(read)
    number = index
    try:
        while number < arguments.cases if deadline is None else time.monotonic() < deadline:
            case = arguments.seed * 10**9 + number
            kind = random.Random(case).choices(kinds, weights)[0]
            verdict = vars(_case(kind, f"{case}", materials))
            os.write(write, json.dumps([kind, case, verdict | {"text": verdict["text"][-3000:]}]).encode() + b"\n")
            number += arguments.workers
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _verdicts(readers: list[int]):
    with selectors.DefaultSelector() as selector:
        files = [os.fdopen(read, "r") for read in readers]
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                if line := key.fileobj.readline():
                    yield json.loads(line)
                else:
                    selector.unregister(key.fileobj)


def _report(table: dict, failures: list) -> None:
    print(f"{'kind':16}{'cases':>8}{'result':>8}{'refused':>9}{'failed':>8}{'slowest':>10}{'peak MiB':>10}")
    for kind in sorted(table):
        row = table[kind]
        counts = f"{row['cases']:8}{row['result']:8}{row['refused']:9}{row['failed']:8}"
        print(f"{kind:16}{counts}{row['slowest']:9.1f}s{row['peak'] / 2**20:10.0f}")
    print(f"{sum(row['cases'] for row in table.values())} cases, {len(failures)} failed")
    if failures:
        kinds = collections.Counter(verdict["outcome"] for _, verdict in failures)
        print(", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()))
        print(f'again: make fuzz FUZZ="--repeat {" ".join(case for case, _ in failures[:20])}"')


if __name__ == "__main__":
    sys.exit(main())
