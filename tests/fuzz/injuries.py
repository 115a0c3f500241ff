"""What downloads, disks, careless users and attackers do to inputs: to bytes, to JSON, to a folder, to values."""

import copy
import json
import math
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any


EXTREMES = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0", b"\0\0\0\1")
NUMBERS = (0, -1, 1, 2, 7, 1.5, 10**6, 10**12, 2**31, 2**63, 10**30, -(2**63), 1e-308, 1e308, math.nan, math.inf)
WORDS = (
    "",
    "x",
    "../../etc/passwd",
    "a" * 100_000,
    "\ud800",
    "\0",
    "no\nline",
    "1e5",
    "null",
    "%s%n{}{{",
    "http://127.0.0.1:9/x",
)
OTHERS = (None, True, False, [], {}, [[]], [1, "x", None], {"a": {"b": 1}}, [0] * 1000)


def value(rng: random.Random) -> Any:
    """Something that a number, a text or a list should not be."""
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, NUMBERS, WORDS, OTHERS))))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three random injuries of a file."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        size = len(data)
        if size < 16:
            break
        place, length = rng.randrange(size), rng.randrange(1, max(size // 4, 2))
        header = rng.randrange(min(size, 1024)) if rng.random() < 0.5 else size - 1 - rng.randrange(min(size, 2048))
        kind = rng.randrange(8)
        if kind == 0:
            for _ in range(rng.choice((1, 4, 30))):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            data[header] = rng.randrange(256)
        elif kind == 5:
            data[header : header + 4] = rng.choice(EXTREMES)
        elif kind == 6:
            data[place : place + length] = bytes(min(length, size - place))
        else:
            other = rng.randrange(size)
            data[place : place + length] = data[other : other + length]
    return bytes(data)


def leaves(tree: Any, path: tuple = ()) -> list[tuple]:
    """Paths to all values of nested lists and dicts, the containers included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return ([path] if path else []) + [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


def edit(tree: Any, rng: random.Random, new=value) -> Any:
    """A copy in which one value is another, or gone, or doubled under another name."""
    tree = copy.deepcopy(tree)
    places = leaves(tree)
    if not places:
        return new(rng)
    *path, last = rng.choice(places)
    parent = tree
    for key in path:
        parent = parent[key]
    kind = rng.randrange(8)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
    elif kind == 2 and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
        parent[last] = rng.choice(
            (parent[last] + 1, -parent[last], parent[last] * 2, f"{parent[last]}", float(parent[last]))
        )
    else:
        parent[last] = new(rng)
    return tree


def edit_json(path: Path, rng: random.Random) -> None:
    edited = edit(json.loads(path.read_text()), rng)
    path.write_bytes(json.dumps(edited).encode("utf-8", "surrogatepass"))


def read_safetensors(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: Any, data: bytes) -> None:
    head = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def damage_safetensors(path: Path, rng: random.Random) -> bool:
    """Damages a file of tensors; whether a reader that verifies has to notice, as a tensor is gone or has a wrong name,
    shape or dtype."""
    header, data = read_safetensors(path)
    kind = rng.randrange(6)
    tensors = sorted(key for key in header if key != "__metadata__")
    if kind == 0:
        del header[rng.choice(tensors)]
    elif kind == 1:
        name = rng.choice(tensors)
        header[f"{name}_"] = header.pop(name)
    elif kind == 2:
        header = edit(header, rng)
    elif kind == 3:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        return True
    elif kind == 4:
        path.write_bytes(
            rng.choice((b"", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}", b"[" * 100_000))
        )
        return True
    else:
        path.write_bytes(mutate(path.read_bytes(), rng))
        return False
    write_safetensors(path, header, data)
    return kind in (0, 1)


def damage_folder(folder: Path, rng: random.Random, needed: tuple[str, ...] = ()) -> bool:
    """Damages one file of a folder; whether a reader that verifies has to notice: see `damage_safetensors`, or one of
    `needed` is gone or empty."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind = rng.randrange(8)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.rename(path.with_name(path.name + ".old"))
    elif kind == 2:
        path.write_bytes(b"")
    elif kind == 3:
        path.unlink()
        rng.choice(
            (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path))
        )()
    elif kind == 4 and path.suffix == ".json":
        edit_json(path, rng)
        return False
    elif path.suffix == ".safetensors":
        return damage_safetensors(path, rng)
    else:
        path.write_bytes(mutate(path.read_bytes(), rng))
        return False
    return path.name in needed


def copy_folder(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))
