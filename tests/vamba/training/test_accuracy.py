"""The demo's task learnt through `vamba finetune` instead: the whole way from a folder of videos to right answers.

Takes several minutes on two cores, so it runs where VAMBA_FULL=1 is set. The demo itself tests the model in CI.
"""

import json
import os
import random

import pytest
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from vamba.cli import main
from vamba.demo import REQUIRED_ACCURACY
from vamba.demo.evaluation import accuracy, ask_about_videos, chance
from vamba.demo.pipeline import BATCH_SIZE, LEARNING_RATE, STEPS, TRAIN_VIDEOS, make_checkpoint, write_videos
from vamba.demo.training import messages
from vamba.demo.videos import FPS, QUESTIONS

from training_data import recipe_values


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.environ.get("VAMBA_FULL") != "1", reason="minutes; set VAMBA_FULL=1")
def test_finetune_reaches_the_demos_accuracy(tmp_path):
    checkpoint = make_checkpoint(tmp_path, seed=0)
    paths, told = write_videos(tmp_path / "videos", TRAIN_VIDEOS, seed=0)
    held_out, answers = write_videos(tmp_path / "held_out", 64, seed=1)
    rng, data = random.Random(0), tmp_path / "train.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for path, story in list(zip(paths, told)) * 6:
            kinds = rng.sample(list(QUESTIONS), len(QUESTIONS))
            chat = messages([QUESTIONS[kind] for kind in kinds], [story.answer(kind) for kind in kinds], True)
            chat[0]["content"][0]["video"] = path.name
            file.write(json.dumps({"messages": chat}) + "\n")
    values = recipe_values(checkpoint, data, tmp_path / "out", max_steps=STEPS, learning_rate=LEARNING_RATE)
    values |= {"datasets": [{"path": str(data), "media_root": str(tmp_path / "videos")}], "fps": FPS}
    values |= {"per_device_train_batch_size": BATCH_SIZE, "dataloader_num_workers": 1, "weight_decay": 0.01}
    values |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "logging_steps": 50}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["finetune", str(tmp_path / "recipe.yaml")]) == 0
    final = tmp_path / "out" / "final"
    model, processor = AutoModelForImageTextToText.from_pretrained(final), AutoProcessor.from_pretrained(final)
    replies = ask_about_videos(model.eval(), processor, held_out, answers)
    print(f"accuracy {accuracy(replies):.3f}, chance {chance(replies):.3f}")
    assert accuracy(replies) >= REQUIRED_ACCURACY
