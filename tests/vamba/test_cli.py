"""The command line: answers and exit code 0, or one clear line and exit code 2."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba
from vamba.cli import main
from vamba.modeling import VideoMemory


def test_ask_prints_an_answer_for_each_question(checkpoint, clip, capsys):
    assert main(["ask", str(clip), "What happens?", "Where?", "--model", str(checkpoint), "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("> ") >= 2 and "> What happens?" in out and "> Where?" in out


def test_questions_may_stand_behind_options(checkpoint, clip, capsys):
    common = ["--model", str(checkpoint), "--max-new-tokens", "4", "--quiet"]
    assert main(["ask", str(clip), *common, "What happens?"]) == 0
    expected = capsys.readouterr().out
    assert main(["ask", str(clip), "What happens?", *common]) == 0
    assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit):
        main(["ask", str(clip), *common, "What happens?", "--nothing", "3"])
    assert "unrecognized arguments: --nothing 3" in capsys.readouterr().err


def test_questions_come_from_standard_input(checkpoint, clip, capsys, monkeypatch):
    common = ["--model", str(checkpoint), "--max-new-tokens", "4", "--temperature", "0", "--quiet"]
    assert main(["ask", str(clip), "What happens?", "Where?", *common]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("What happens?\n\n  Where?\n"))
    assert main(["ask", str(clip), *common]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xff"), "utf-8"))
    assert main(["ask", str(clip), *common]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_a_seed_makes_samples_the_same_again(checkpoint, clip, capsys):
    said = []
    for seed in (1, 1, 2):
        common = ["--model", str(checkpoint), "--max-new-tokens", "8", "--quiet"]
        assert (
            main(["ask", str(clip), "What?", *common, "--temperature", "5", "--top-k", "0", "--seed", f"{seed}"]) == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    assert main(["ask", str(clip), "What?", *common, "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-5", str(2**32), "one"])
def test_a_seed_is_a_number_that_all_libraries_take(seed, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ask", "a.mp4", "What?", "--model", "m", "--seed", seed])
    assert ended.value.code == 2 and "--seed" in capsys.readouterr().err


def test_the_version_and_what_a_shell_completes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"vamba {vamba.__version__}\n"
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert ended.value.code == 0 and subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    line = "COMP_WORDS=(vamba ask --max-n); COMP_CWORD=2; _shtab_vamba; echo ${COMPREPLY[@]}"
    completed = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True)
    assert "--max-new-tokens" in completed.stdout, completed


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
    whole = memory.read_bytes()
    memory.write_bytes(whole[:-9] + b"\xff" * 9)  # NaN
    assert main(["ask", str(memory), "What happens?", *common]) == 2
    assert "is damaged: its checksum is not that" in capsys.readouterr().err
    memory.write_bytes(whole)
    loaded = VideoMemory.load(memory)
    others = (
        {"made_by": "0" * 16 + "::", "media": [], "_times": []},
        {"media": loaded.media * 2},
        {"made_by": "0" * 16 + "::"},
    )
    for changes, message in zip(others, ("holds 0 rows", "damaged|whole", "made with other weights")):
        vars(changed := loaded.fork()).update(changes)
        changed.save(memory)
        assert main(["ask", str(memory), "What happens?", *common]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1


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


def test_a_file_that_says_it_lasts_for_ever_takes_no_room_for_that(shared, checkpoint, capsys):
    video = shared / "repro" / "duration_huge.mkv"  # whose header says 1e15
    assert main(["ask", str(video), "What?", "--model", str(checkpoint), "--max-new-tokens", "2"]) == 0
    error = capsys.readouterr().err
    assert "watching:" in error and "000000" not in error  # of the bar's total


def test_mistakes_that_are_found_before_the_video_is_encoded(checkpoint, clip, tmp_path, capsys):
    asking = ["ask", str(clip), "What?", "--model", str(checkpoint)]
    assert main([*asking, "--save-memory", str(tmp_path / "no" / "m.safetensors")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    for name in ("", "x" * 245):
        assert main([*asking, "--save-memory", name]) == 2
    assert main([*asking, "--save-memory", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is a folder; give the name of a file" in error and "watching" not in error
    before = clip.read_bytes()
    (tmp_path / "link").symlink_to(clip)
    for path in (clip, tmp_path / "link", "/dev/null"):
        assert main([*asking, "--save-memory", str(path)]) == 2
        error = capsys.readouterr().err
        assert "is no memory; give the name of a new file" in error and error.count("\n") == 1
    assert clip.read_bytes() == before
    (tmp_path / "talk.safetensors").write_bytes(before)
    assert main(["ask", str(tmp_path / "talk.safetensors"), *asking[2:]]) == 2
    assert "is damaged or no safetensors file" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*asking, "--device", "cuda:0"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("vamba: device='cuda:0' cannot be used here (") and error.count("\n") == 1


def test_mistakes_of_other_kinds_are_mistakes_too(checkpoint, clip, tmp_path, capsys):
    asking = ["ask", str(clip), "What?"]
    assert main([*asking, "--model", str(checkpoint), "--device", "gpu9"]) == 2
    assert "device='gpu9' cannot be used here" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main([*asking, "--model", str(tmp_path)]) == 2
    assert "config.json is no JSON object" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(tmp_path / "x" / "out"), "--max-shard-size", "huge"]) == 2
    assert "huge" in capsys.readouterr().err


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

    with pytest.raises(ValueError):
        main(["convert", str(tmp_path), str(tmp_path / "out"), "--debug"])


@pytest.mark.parametrize("error", [RuntimeError("no wandb\nhere"), ValueError("deep inside"), ImportError("torch")])
def test_a_fault_is_one_line_that_names_the_file_with_its_traceback(error, tmp_path, capsys, monkeypatch):
    def convert(*args, **options):
        raise error

    monkeypatch.setattr("vamba.conversion.checkpoint.convert", convert)
    assert main(["convert", "a", "b"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith(f"vamba: {type(error).__name__}: {str(error).split()[0]}")
    log = Path(line.rsplit(" ", 1)[1].rstrip(")\n"))
    assert "Traceback" in (text := log.read_text()) and "raise error" in text
    log.unlink()
    with pytest.raises(type(error)):
        main(["convert", "a", "b", "--debug"])


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_fault(buffered, tmp_path):
    code = "import sys; from vamba import cli, info; info.run = lambda args: [print(i) for i in range(10**5)] and 0"
    with open(tmp_path / "err", "w") as err:
        command = [sys.executable, "-c", f"{code}; sys.exit(cli.main(['info', 'x']))"]
        environment = os.environ | {"PYTHONUNBUFFERED": buffered}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=environment)
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.wait() == 0
    assert (tmp_path / "err").read_text() == ""


def test_a_broken_pipe_that_is_not_stdout_is_a_fault(capsys, monkeypatch):
    def convert(*args, **options):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            os.write(writing, b"x")
        finally:
            os.close(writing)

    monkeypatch.setattr("vamba.conversion.checkpoint.convert", convert)
    assert main(["convert", "a", "b"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("vamba: BrokenPipeError: ")
    Path(line.rsplit(" ", 1)[1].rstrip(")\n")).unlink()


def test_paths_that_cannot_be_used_are_mistakes(checkpoint, clip, tmp_path, capsys):
    """Said where they are opened: no error is taken for the user's because it is about a path."""
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    below, full, gone = (str(tmp_path / name) for name in ("file/out", "full", "gone.safetensors"))
    for arguments in (
        ["convert", str(checkpoint), below],
        ["convert", str(checkpoint), full],
        ["convert", str(tmp_path / "gone"), below],
        ["demo", "--output-dir", below],
        ["demo", "--output-dir", full],
        ["bench", "--model", str(checkpoint), "--out", below],
        ["bench", "--plot", str(tmp_path / "gone.csv")],
        ["finetune", str(tmp_path / "gone.yaml")],
        ["finetune", str(tmp_path / ("x" * 300))],
        ["info", str(tmp_path / ("x" * 300))],
        ["ask", gone, "What?", "--model", str(checkpoint)],
        ["ask", str(tmp_path / "gone.mp4"), "What?", "--model", str(checkpoint)],
        [
            "ask",
            str(clip),
            "What?",
            "--model",
            str(checkpoint),
            "--quiet",
            "--where",
            str(tmp_path / f"{'x' * 300}.html"),
        ],
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("vamba: ") and error.count("\n") == 1, error


@pytest.mark.parametrize("missing", ["weights", "index", "processor", "tokenizer"])
def test_a_checkpoint_that_is_not_whole(missing, checkpoint, clip, tmp_path, capsys):
    parts = {"weights": "*.safetensors", "processor": "*processor*", "tokenizer": "*token*"}
    shutil.copytree(checkpoint, tmp_path / "model")
    for file in (tmp_path / "model").glob(parts.get(missing, "*.safetensors")):
        file.unlink()
    if missing == "index":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["ask", str(clip), "What?", "--model", str(tmp_path / "model"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "model") in error


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["runs/dmeo", "dmeo", "./runs/dmeo"])
def test_a_mistyped_model_is_answered_before_anything_heavy_is_imported(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    code = "import sys; from vamba.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = python(code, "ask", "clip.mp4", "What?", "--model", name)
    assert done.stdout == "2 False\n" and done.stderr.count("\n") == 1 and done.stderr.startswith(f"vamba: {name}")


def in_the_hubs_cache(folder, repo_id, cache):
    """A checkpoint as `hf download` leaves it."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))


def test_info_takes_an_id_on_the_hub(checkpoint, tmp_path, capsys, monkeypatch):
    in_the_hubs_cache(checkpoint, "me/tiny", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["info", "me/tiny"]) == 0
    assert "hidden_size                          64" in capsys.readouterr().out
    assert main(["info", "me/other"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "me/other is no folder here, and the Hub does not give it" in error


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """An adapter that changes what is answered."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_described_and_asked_with_its_base_model(adapter, checkpoint, clip, tmp_path, capsys):
    assert main(["info", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "adapter                              LORA" in out and str(checkpoint) in out and "hidden_size" in out
    asking = ["ask", str(clip), "What happens?", "--max-new-tokens", "6", "--quiet"]
    assert main([*asking, "--model", str(adapter)]) == 0
    answer = capsys.readouterr().out
    merged = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(checkpoint), adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "merged")
    assert main([*asking, "--model", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == answer
    assert main([*asking, "--model", str(checkpoint)]) == 0
    assert capsys.readouterr().out != answer


def test_an_adapter_without_its_base_model_says_so(adapter, clip, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert main(["ask", str(clip), "What?", "--model", str(config.parent)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is an adapter, and its base model is not here" in error and "gone" in error
    assert main(["info", str(config.parent)]) == 0
    assert "LORA" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["itself", "another"])
def test_an_adapter_of_an_adapter_is_refused(base, adapter, clip, tmp_path, capsys):
    base = tmp_path / "adapter" if base == "itself" else adapter
    shutil.copytree(adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    assert main(["ask", str(clip), "What?", "--model", str(config.parent)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"is an adapter of {base}, an adapter itself; merge" in error
    assert main(["info", str(config.parent)]) == 0
    assert "an adapter itself; merge" in capsys.readouterr().out


def test_bench_refuses_an_adapter(adapter, checkpoint, capsys):
    assert main(["bench", "--model", str(adapter), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{adapter} is an adapter of {checkpoint}" in error


def test_a_source_without_a_tokenizer_is_named(checkpoint, tmp_path, caplog):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, bare)
    assert main(["convert", str(bare), str(tmp_path / "out"), "--no-progress"]) == 0
    assert f"{bare} holds no tokenizer and no image processor" in caplog.text and len(caplog.records) == 1
    caplog.clear()
    assert main(["convert", str(checkpoint), str(tmp_path / "whole"), "--no-progress"]) == 0
    assert not caplog.records


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
