"""Lines of JSON, of which a broken one breaks nothing else, and lists of examples, which are whole or refused."""

import pickle

import numpy as np
import pytest

from vamba.data import ExampleError, Source, json_rows
from vamba.data.json_rows import JsonRows


BROKEN = {
    b'{"id": 1, ': "it is no JSON: Expecting property name",
    b"[1]": "it is a list, no object with `messages` or `conversations`",
    b"7": "it is a int, no object",
    b"null": "it is a NoneType, no object",
    b"[" * 100_000: "it is nested too deeply",
    b'{"id": "\xff"}': "it is not UTF-8 from byte 8 on",
    b'{"id": 1, "id": 2}': "an object in it has a key twice",
    b'{"id": ' + b"1" * 5000 + b"}": "Exceeds the limit",
    b'{"id": 1} x': "it is no JSON: Extra data",
    b"\0": "it is no JSON: Expecting value",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n  \t\n"])
def test_a_broken_line_is_named_and_the_others_are_there(end, streaming, tmp_path):
    path = tmp_path / "data.jsonl"
    good = [b'{"id": "%d"}' % n for n in range(5)]
    path.write_bytes(b"\xef\xbb\xbf" + end.join([*good, *BROKEN, *good, b'{"id": "last", "fps": NaN, "n": 1e999}']))
    found = list(Source(path, streaming=streaming, shuffle=False).examples())
    assert [row["id"] for row in found if isinstance(row, dict)] == [*"01234", *"01234", "last"]
    for number, (error, reason) in enumerate(zip(found[5:], BROKEN.values()), start=5):
        line = 1 + number * end.count(b"\n")
        assert isinstance(error, ExampleError) and f"{error}".startswith(f"data.jsonl line {line}: {reason}")


def test_a_line_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "LONGEST", 1000)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": "' + b"x" * 5000 + b'"}\n{"id": 3}')
    for streaming in (False, True):
        one, two, three = Source(path, streaming=streaming, shuffle=False).examples()
        assert (one["id"], three["id"]) == (1, 3) and "data.jsonl line 2: it is longer than" in f"{two}"


def test_where_lines_begin_takes_eight_bytes_a_line(tmp_path):
    texts = ["x" * int(n) for n in np.random.default_rng(0).integers(0, 300, 2000)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {n}, "text": "{text}"}}\n' for n, text in enumerate(texts)))
    (tmp_path / "b.json").write_text('[{"n": 2000}, \n{"n": 2001, "l": [1, ["é"]]} ,\n 5, {"n": 2003}]\n', "utf-8")
    rows = pickle.loads(pickle.dumps(JsonRows([tmp_path / "a.jsonl", tmp_path / "b.json"])))
    assert len(rows) == 2004 and len(pickle.dumps(rows)) < 8 * 2004 + 1000
    assert [rows[n]["n"] for n in (0, 7, 1999, 2000, 2001, 2003)] == [0, 7, 1999, 2000, 2001, 2003]
    assert all(rows[n]["text"] == text for n, text in enumerate(texts))
    with pytest.raises(ExampleError, match="^b.json item 3: it is a int, no object"):
        rows[2002]
    with pytest.raises(IndexError):
        rows[2004]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"id": 1},\n {"id"', r"no whole list of examples: Expecting ':' delimiter at line 2 column 7"),
        (b"[", "no whole list of examples: Expecting value at line 1 column 2"),
        (b'[{"id": 1} {}]', "Expecting ',' delimiter at line 1 column 12"),
        (b'[\n{"id": 1}]\nx', "Extra data at line 3 column 1"),
        (b'[\n{"id": "\xff"}]', "not UTF-8 from byte 10 on"),
        (b'[{"a": ' + b"[" * 100_000, "an example of the list is nested too deeply"),
        (b"[]", "holds no example"),
        (b"", "holds no example"),
        (b"\n \n", "holds no example"),
    ],
)
def test_a_file_without_whole_examples_is_refused(content, reason, tmp_path):
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path / name}.*{reason}"):
            Source(tmp_path / name)


def test_a_file_that_goes_away_is_no_broken_example(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1}\n')
    source = Source(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path}"):
        source[0]
