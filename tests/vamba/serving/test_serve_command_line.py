"""`vamba serve`: a user's mistakes are one line and exit code 2, told before a model is loaded."""

import socket

import pytest

from vamba.cli import main


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL is needed"),
        (["MODEL", "--model", "MODEL"], "MODEL is needed, once"),
        (["nowhere"], "nowhere is no folder"),
        (["runs/dmeo"], "runs/dmeo"),
        (["MODEL", "--port", "TAKEN"], "in use; choose another"),
        (["MODEL", "--host", "203.0.113.1"], "choose another"),
        (["MODEL", "--media-root", "nowhere"], "nowhere, no folder"),
        (["MODEL", "--cache-dir", "/proc/nothing"], "/proc/nothing"),
        (["MODEL", "--temperature", "-1"], "temperature"),
        (["MODEL", "--start", "5", "--end", "2"], "must be after"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, checkpoint, taken, capsys):
    given = [{"MODEL": str(checkpoint), "TAKEN": taken}.get(argument, argument) for argument in arguments]
    assert main(["serve", *given, *(["--port", "0"] if "--port" not in given else [])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--port=x", "--port=70000", "--cache-cpu=-1", "--cache-gpu=nan", "--max-body=0"])
def test_an_option_of_the_wrong_kind(option, checkpoint, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", str(checkpoint), option])
    assert capsys.readouterr().err.count("\n") == 1
