"""What a run leaves behind is whole, is never overwritten, and is uploaded with all that belongs to it."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from vamba.cli import main
from vamba.errors import UserError
from vamba.training import RecipeError, load_recipe, make_trainer, prepare, save

from training_data import free_port, run, weights


def test_tied_weights_are_saved_once(values, checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "tied")
    values |= {"model_name_or_path": str(tmp_path / "tied"), "dtype": "bfloat16"}
    with safe_open(run(values, bf16=True, max_steps=1).folder / "model.safetensors", "pt") as saved:
        assert "lm_head.weight" not in saved.keys() and len(list(saved.keys())) == len(model.state_dict()) - 1


def test_a_result_is_not_overwritten(values, tmp_path, capsys):
    run(values, max_steps=1)
    mine = tmp_path / "out" / "final" / "notes.txt"
    mine.write_text("mine")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    for options in ([], ["--resume"]):
        assert main(["finetune", str(tmp_path / "r.yaml"), *options]) == 2
        assert "which holds final, a trained model" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_a_finished_run_stays_as_it_is(values, tmp_path, capsys):
    """Unless its model is from before the last checkpoint, as after a kill between the two."""
    values |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    losses = run(values).losses
    mine = tmp_path / "out" / "final" / "notes.txt"
    mine.write_text("mine")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    assert main(["finetune", str(tmp_path / "r.yaml"), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "the run is finished: it has trained 2 steps, and the model is in" in out and "trained 3" not in out
    assert run(values, resume=True).losses == losses and mine.read_text() == "mine"
    shutil.copytree(mine.parent, tmp_path / "old")
    expected = weights(run(values, resume=True, max_steps=3, save_steps=3).folder)
    shutil.rmtree(mine.parent)
    (tmp_path / "old").rename(mine.parent)
    found = run(values, resume=True, max_steps=3, save_steps=3)
    assert found.steps == 3 and not mine.exists()
    assert all(torch.equal(expected[name], value) for name, value in weights(found.folder).items())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 32 MB, for which one has to be allowed to mount."""
    (tmp_path / "disk").mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=32M", "none", tmp_path / "disk"]).returncode:
        pytest.skip("nothing can be mounted here")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_a_full_disk_leaves_the_earlier_result(values, small_disk, capsys):
    output = small_disk / "out"
    values |= {"output_dir": str(output), "max_steps": 1, "save_strategy": "steps"}
    final = run(values).folder
    before = {file.name: file.read_bytes() for file in final.iterdir()}
    (small_disk / "r.yaml").write_text(yaml.safe_dump(values | {"max_steps": 2, "save_strategy": "no"}))
    with open(small_disk / "filler", "wb") as filler:
        filler.write(bytes(shutil.disk_usage(small_disk).free - 2**16))
    assert main(["finetune", str(small_disk / "r.yaml"), "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is full: the trained model could not be written" in line and "(checkpoint-1, final)" in line
    assert {path.name for path in output.iterdir()} == {"checkpoint-1", "final"}
    assert {file.name: file.read_bytes() for file in final.iterdir()} == before
    (small_disk / "filler").unlink()
    assert main(["finetune", str(small_disk / "r.yaml"), "--resume"]) == 0
    assert "trained 2 steps" in capsys.readouterr().out


def test_push_to_hub_without_a_network(values, monkeypatch):
    """Nothing listens at the port."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    values |= {"push_to_hub": True, "hub_model_id": "me/tuned", "max_steps": 1}
    for resume in (False, True):
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"/out/final; run again with --resume to push it: me/tuned could not be"):
            run(values, resume=resume)
        assert time.monotonic() - begin < 30
    with pytest.raises(RecipeError, match="hub_model_id is a/b/c; accepted: "):
        run(values, hub_model_id="a/b/c")


@pytest.mark.parametrize("checkpoints", ["none", "one", "a damaged one"])
def test_a_finished_run_says_so_whatever_is_beside_it(checkpoints, values, tmp_path):
    """Until it is to do more steps, for which it needs a checkpoint."""
    values |= {"max_steps": 1, "save_strategy": "no" if checkpoints == "none" else "steps"}
    expected, output = run(values), tmp_path / "out"
    if checkpoints == "a damaged one":
        (output / "checkpoint-1" / "optimizer.pt").unlink()
    (output / "final.unfinished").mkdir()  # as of a run that was killed while it deleted what was there before
    found = run(values, resume=True)
    assert not found.trained and (found.steps, found.losses) == (1, expected.losses)
    assert not (output / "final.unfinished").exists()
    with pytest.raises(RecipeError, match="which holds"):
        run(values)
    if checkpoints == "one":
        assert run(values, resume=True, max_steps=2).steps == 2
        for name in ("trainer_state.json", "model.safetensors"):  # it is not whole, so it is made anew
            (output / "final" / name).write_text("{")
            assert run(values, resume=True, max_steps=2).trained
        weights(output / "final")
    else:
        with pytest.raises(RecipeError, match="a trained model of 1 of 2 steps, and no checkpoint to go on from"):
            run(values, resume=True, max_steps=2)


@pytest.mark.parametrize("card", [b"---\nlicense: [apache\n---\n", b"---\nlicense: mit\n---\n\xe9"])
def test_a_base_models_card_may_be_unreadable(card, values, checkpoint, tmp_path):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "README.md").write_bytes(card)
    values["model_name_or_path"] = str(base)
    assert ("license: mit" in (run(values, max_steps=1).folder / "README.md").read_text()) == (b"mit" in card)


def test_what_is_trained_is_kept_whatever_goes_wrong_after(values, checkpoint, tmp_path):
    """Here nothing can be put where the model belongs."""
    final, kept = tmp_path / "out" / "final", tmp_path / "out" / "final.unfinished"
    recipe = load_recipe(values | {"max_steps": 1})
    trainer = make_trainer(prepare(recipe))
    trainer.train()
    final.write_text("of the user")
    with pytest.raises(OSError, match=f"the model is trained and its weights are in {kept}, but final could not"):
        save(trainer, recipe)
    expected = trainer.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in weights(kept).items())
    assert final.read_text() == "of the user"
    final.unlink()
    with pytest.raises(ValueError, match="which holds final.unfinished, a trained model"):
        run(values)


def test_push_to_hub_uploads_all_of_it(values, checkpoint, tmp_path, monkeypatch):
    uploaded = {}
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: some/base\n---\n# Base\n")
    values["model_name_or_path"] = str(base)

    class StandIn:
        """Of huggingface_hub.HfApi: the calls an upload makes."""

        def __init__(self, token=None):
            uploaded["token"] = token

        def model_info(self, repo_id, timeout):
            return None

        def create_repo(self, repo_id, private=None, exist_ok=False):
            uploaded["private"] = private
            return type("RepoUrl", (), {"repo_id": repo_id})

        def file_exists(self, repo_id, filename):
            return False

        def upload_folder(self, repo_id, folder_path, commit_message):
            if "repo_id" not in uploaded:
                uploaded["repo_id"] = None
                raise ConnectionError("the Hub is away")
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            uploaded.update(repo_id=repo_id, files=files)
            return "https://hub/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", StandIn)
    values |= {"push_to_hub": True, "hub_model_id": "me/tuned", "hub_private_repo": True, "hub_token": "t"}
    values |= {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(UserError, match=r"model is in .*/final; run again with --resume to push it: .*the Hub is away"):
        run(values)
    result = run(values, resume=True)  # which trains nothing more
    assert not result.trained
    assert (uploaded["repo_id"], uploaded["private"], uploaded["token"]) == ("me/tuned", True, "t")
    wanted = {"config.json", "model.safetensors", "modeling_vamba.py", "processor_config.json", "tokenizer.json"}
    assert wanted <= uploaded["files"].keys()
    for card in (uploaded["files"]["README.md"].decode(), (result.folder / "README.md").read_text()):
        front = yaml.safe_load(card.split("---")[1])
        assert (front["license"], front["base_model"]) == ("cc-by-nc-4.0", "some/base") and "Fine-tuned from" in card
    assert uploaded["files"]["model.safetensors"] == (result.folder / "model.safetensors").read_bytes()
    assert "hub_token" not in (result.folder / "recipe.yaml").read_text()
