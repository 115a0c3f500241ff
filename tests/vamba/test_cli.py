"""The command line: answers and exit code 0, or one clear line and exit code 2."""

import pytest
import torch

from vamba.cli import main


def test_ask_prints_an_answer_for_each_question(checkpoint, clip, capsys):
    assert main(["ask", str(clip), "What happens?", "Where?", "--model", str(checkpoint), "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("> ") >= 2 and "> What happens?" in out and "> Where?" in out


def test_ask_answers_about_real_footage(checkpoint, footage, capsys):
    arguments = ["--model", str(checkpoint), "--max-new-tokens", "4", "--fps", "2", "--quiet"]
    assert main(["ask", str(footage), "What happens?", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() and "watching" not in captured.err


def test_a_saved_memory_is_asked_again(checkpoint, clip, tmp_path, capsys):
    memory = tmp_path / "talk.safetensors"
    common = ["--model", str(checkpoint), "--max-new-tokens", "6", "--quiet"]
    assert main(["ask", str(clip), "What happens?", *common, "--save-memory", str(memory)]) == 0
    first = capsys.readouterr().out
    assert main(["ask", str(memory), "What happens?", *common]) == 0
    assert capsys.readouterr().out == first


def bad_videos(folder, clip):
    text, empty, cut = folder / "text.mp4", folder / "empty.mp4", folder / "cut.mp4"
    text.write_text("this is no video\n" * 99)
    empty.write_bytes(b"")
    cut.write_bytes(clip.read_bytes()[:300])
    return {
        "missing": (str(folder / "missing.mp4"), []),
        "text": (str(text), []),
        "empty": (str(empty), []),
        "truncated": (str(cut), []),
        "a folder without images": (str(folder / "nothing"), []),
        "past the end": (str(clip), ["--start", "99"]),
        "end before start": (str(clip), ["--start", "1", "--end", "0.5"]),
        "negative": (str(clip), ["--start", "-1"]),
        "both": (str(clip), ["--fps", "1", "--num-frames", "3"]),
        "zero fps": (str(clip), ["--fps", "0"]),
        "url": ("https://example.com/clip.mp4", []),
    }


@pytest.mark.parametrize(
    "mistake",
    ["missing", "text", "empty", "truncated", "a folder without images", "past the end", "end before start", "negative",
     "both", "zero fps", "url"],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_2(mistake, checkpoint, clip, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    video, options = bad_videos(tmp_path, clip)[mistake]
    assert main(["ask", video, "What?", "--model", str(checkpoint), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("vamba: ") and captured.err.count("\n") == 1


def test_a_missing_model_is_a_users_mistake(clip, tmp_path, capsys):
    assert main(["ask", str(clip), "What?", "--model", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_mistakes_that_are_found_before_the_video_is_encoded(checkpoint, clip, tmp_path, capsys):
    asking = ["ask", str(clip), "What?", "--model", str(checkpoint)]
    assert main([*asking, "--save-memory", str(tmp_path / "no" / "m.safetensors")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*asking, "--device", "cuda:0"]) == 2
        assert (
            capsys.readouterr().err
            == "vamba: There is no CUDA device for device='cuda:0'; leave it out or use 'cpu'.\n"
        )


def test_another_kind_of_checkpoint_is_named(checkpoint, clip, tmp_path, capsys):
    qwen = checkpoint.parent / "qwen"
    for arguments in (["ask", str(clip), "What?", "--model", str(qwen)], ["info", str(qwen)]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "is a qwen2_vl checkpoint, not a Vamba" in error
    assert main(["info", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_convert_refuses_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "config.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError):
        main(["--debug", "convert", str(tmp_path), str(tmp_path / "out")])


def test_info_describes_a_checkpoint(checkpoint, capsys):
    assert main(["info", str(checkpoint)]) == 0
    assert "hidden_size                          64" in capsys.readouterr().out


def test_usage_errors_exit_with_2(capsys):
    asking = ["ask", "v.mp4", "q", "--model", "m"]
    for arguments in ([], ["ask"], ["nonsense"], asking[:3], [*asking, "--max-new-tokens", "0"], ["ask", "v.mp4", ""]):
        with pytest.raises(SystemExit) as exit_code:
            main(arguments)
        assert exit_code.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--help" in error
