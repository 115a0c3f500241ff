"""Video-Ma2mba through the library: chat, command line, hub files, pipelines, Trainer."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import vamba
from vamba import hub
from vamba.cli import main
from vamba.modeling import StateMemory, VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor


GREEDY = {"max_new_tokens": 8, "do_sample": False}


def said(question):
    """A conversation of its own."""
    return [{"role": "user", "content": question}]


@pytest.fixture
def chat(ma2mba):
    model = AutoModelForImageTextToText.from_pretrained(ma2mba).eval()
    with torch.no_grad():  # answers that depend on what was seen
        model.model.projector[2].weight.mul_(20)
    return vamba.VideoChat(model, AutoProcessor.from_pretrained(ma2mba))


def ask_at_once(chat, clip, question, **options):
    content = [{"type": "video", "video": str(clip), **options}, {"type": "text", "text": question}]
    inputs = chat.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = chat.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    return chat.processor.batch_decode(output, skip_special_tokens=True)[0].strip(), inputs


@pytest.mark.parametrize("chunk_frames", [1, 3, None])
def test_watching_in_chunks_equals_the_processor_at_once(chat, clip, chunk_frames):
    expected, inputs = ask_at_once(chat, clip, "What happens?", fps=8.0)
    memory = chat.watch(clip, fps=8, chunk_frames=chunk_frames, progress=False)
    assert memory.media == [[["video", 16, 4, 4]]] and inputs["video_grid_thw"].tolist() == [[16, 4, 4]]
    at_once = chat.model.encode_video(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    for ours, theirs in zip(memory.states, at_once.states):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert chat.ask(said("What happens?"), **GREEDY) == expected
    assert "".join(chat.ask(said("What happens?"), stream=True, **GREEDY)).strip() == expected


def test_questions_do_not_see_each_other_and_videos_add_up(chat, clip):
    chat.watch(clip, progress=False)
    first = chat.ask(said("What happens?"), **GREEDY)
    chat.ask(said("Something else entirely?"), **GREEDY)
    assert chat.ask(said("What happens?"), **GREEDY) == first and chat.memory.get_seq_length() == 1
    chat.watch(clip, append=True, progress=False)
    assert chat.memory.media == [[["video", 2, 4, 4]] * 2] and isinstance(chat.ask(said("And now?"), **GREEDY), str)


def test_ask_on_the_command_line_from_a_file_and_from_a_memory(ma2mba, clip, tmp_path, capsys):
    memory = tmp_path / "talk.safetensors"
    common = ["--model", str(ma2mba), "--max-new-tokens", "6", "--quiet"]
    assert main(["ask", str(clip), "What happens?", *common, "--save-memory", str(memory)]) == 0
    first = capsys.readouterr().out
    assert main(["ask", str(memory), "What happens?", *common]) == 0
    assert capsys.readouterr().out == first and StateMemory.load(memory).video_length == 2 * 4
    assert main(["ask", str(clip), "What?", *common, "--max-pixels", "200000"]) == 2
    assert "frames of 32 x 32 pixels only" in capsys.readouterr().err


def test_memories_of_the_other_model_are_refused(checkpoint, ma2mba, clip, tmp_path, capsys):
    memory = str(tmp_path / "talk.safetensors")
    assert main(["ask", str(clip), "What?", "--model", str(checkpoint), "--quiet", "--save-memory", memory]) == 0
    assert main(["ask", memory, "What?", "--model", str(ma2mba)]) == 2
    assert "memory of another kind of model" in capsys.readouterr().err


def test_convert_and_info_on_the_command_line(ma2mba, tmp_path, capsys):
    source = ma2mba.parent
    arguments = [str(source / "mamba2"), str(tmp_path / "out"), "--vision", str(source / "clip"), "--no-progress"]
    assert main(["convert", *arguments]) == 0 and main(["info", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "video_ma2mba" in out and "tokens_per_frame                     4" in out
    assert main(["convert", str(source / "mamba2"), str(tmp_path / "other")]) == 2
    assert "--vision" in capsys.readouterr().err


def test_the_benchmark_of_vamba_is_not_for_it(ma2mba, capsys):
    assert main(["bench", "--model", str(ma2mba), "--frames", "8"]) == 2
    assert "is a video_ma2mba checkpoint, and vamba bench measures a Vamba" in capsys.readouterr().err


def test_described_states_are_what_a_memory_takes(ma2mba):
    about = hub.describe(ma2mba)
    model = AutoModelForImageTextToText.from_pretrained(ma2mba, dtype=torch.bfloat16)
    memory = StateMemory(model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), past_key_values=memory)
    assert about["state_bytes_bf16"] == memory.video_nbytes


def test_the_model_card(ma2mba):
    text = (ma2mba / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text" and "video-ma2mba" in front["tags"]
    assert "$" not in text and "projector is freshly initialised" in text and "3 layers of width 64" in text
    compile(text.split("```python")[1].split("```")[0], "README.md", "exec")


STRANGER = """
import sys
sys.modules["vamba"] = None  # as if it were not installed
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, clip = sys.argv[1:]
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
content = [{"type": "video", "video": clip, "fps": 4.0}, {"type": "text", "text": "What happens?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist())
memory = model.encode_video(inputs["pixel_values_videos"], inputs["video_grid_thw"])
print(type(AutoModel.from_pretrained(folder, **trust)).__name__, type(model).__name__, type(processor).__name__)
print(memory.video_length, type(model).__module__.split(".")[0])
"""


@pytest.mark.parametrize("saved_by", ["converter", "save_pretrained"])
def test_a_machine_without_the_package_loads_it(ma2mba, clip, tmp_path, saved_by):
    model, processor = AutoModelForImageTextToText.from_pretrained(ma2mba), AutoProcessor.from_pretrained(ma2mba)
    content = [{"type": "video", "video": str(clip), "fps": 4.0}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    folder = ma2mba
    if saved_by == "save_pretrained":
        folder = tmp_path / "saved"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), str(clip)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("Videos are read by transformers' load_video") == 1
    assert result.stdout.splitlines() == [
        str(expected),
        "VideoMa2mbaModel VideoMa2mbaForConditionalGeneration VideoMa2mbaProcessor",
        "32 transformers_modules",
    ]


def test_the_code_stands_alone(tmp_path):
    files = hub.write_remote_code(tmp_path, "video_ma2mba")
    names = {file.stem for file in files}
    assert {"modeling_video_ma2mba", "media", "state_memory", "mamba2", "processing_vamba"} <= names
    for file in files:
        assert not {"vamba", "modeling"} & set(get_imports(file)), file.name
        assert set(get_relative_imports(file)) <= names, file.name


def test_auto_classes_and_auto_map(ma2mba):
    assert type(AutoModelForMultimodalLM.from_pretrained(ma2mba)) is VideoMa2mbaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(ma2mba)) is VideoMa2mbaProcessor
    for target in json.loads((ma2mba / "config.json").read_text())["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}" in (ma2mba / f"{module}.py").read_text()


def test_a_pipeline_answers_about_a_video_path(ma2mba, clip):
    model = AutoModelForImageTextToText.from_pretrained(ma2mba)
    pipe = pipeline("image-text-to-text", model=model, processor=AutoProcessor.from_pretrained(ma2mba))
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What happens?"}]
    (output,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert output["generated_text"][-1]["role"] == "assistant"


def test_trainer_trains_and_predicts(chat, tmp_path):
    """Padded rows with and without video; predictions come back in the caller's layout."""
    tokenizer = chat.processor.tokenizer
    start, end = chat.model.config.vision_start_token_id, chat.model.config.vision_end_token_id
    texts = [[start, end, *tokenizer("What happens?").input_ids], tokenizer("in the video").input_ids] * 2
    rows = [{"ids": ids, "seed": index} for index, ids in enumerate(texts)]

    def collate(rows):
        batch = tokenizer.pad({"input_ids": [row["ids"] for row in rows]}, padding_side="left", return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        seen = int((batch["input_ids"] == start).sum())
        batch["pixel_values_videos"] = torch.randn(seen * 3 * 16, 3 * 64)
        batch["video_grid_thw"] = torch.tensor([[3, 4, 4]] * seen)
        return dict(batch)

    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-3,
        remove_unused_columns=False, report_to="none", use_cpu=True, gradient_checkpointing=True, save_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(chat.model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)
    before = {name: parameter.clone() for name, parameter in chat.model.named_parameters()}
    assert 0 < trainer.train().training_loss < 20
    assert all(
        not torch.equal(before[name], parameter)
        for name, parameter in chat.model.named_parameters()
        if "k_proj.bias" not in name
    )
    output = trainer.predict(rows)
    assert output.predictions.shape == (4, max(map(len, texts)), chat.model.config.text_config.vocab_size)


def test_trl_and_peft_take_it(chat, tmp_path):
    trl, peft, datasets = (pytest.importorskip(name) for name in ("trl", "peft", "datasets"))
    ids = torch.tensor([[chat.model.config.vision_start_token_id, chat.model.config.vision_end_token_id, 5, 6, 7]])
    media = {"pixel_values_videos": torch.randn(3 * 16, 3 * 64), "video_grid_thw": torch.tensor([[3, 4, 4]])}
    model = peft.get_peft_model(chat.model, peft.LoraConfig(target_modules=["in_proj", "out_proj"]))
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=1, use_cpu=True, bf16=False, report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist() * 4}),
        data_collator=lambda rows: {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), **media},
        processing_class=chat.processor.tokenizer,
    )
    assert 0 < trainer.train().training_loss < 20
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert model.generate(input_ids=ids, **media, max_new_tokens=2, min_new_tokens=2).shape == (1, 7)
