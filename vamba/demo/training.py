"""Fine-tuning on the demo's videos with transformers' `Trainer`.

What is unusual: a video is encoded once per step however much is asked about it, so each example is one conversation
with all the questions in random order. One conversation in eight comes without its video, which teaches the model what
the text alone is worth: the baseline that the demo prints beside the accuracy.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

from .videos import FPS, QUESTIONS, Story


WITHOUT_VIDEO = 1 / 8
IGNORED = -100


def messages(questions: Sequence[str], answers: Sequence[str], with_video: bool) -> list[dict]:
    """A conversation: the video (if any) with the first question, then answers and further questions in turn."""
    chat = []
    for question, answer in zip(questions, answers):
        chat.append({"role": "user", "content": [{"type": "text", "text": question}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if with_video:
        chat[0]["content"].insert(0, {"type": "video"})
    return chat


def read_examples(paths: Sequence[Path], told: Sequence[Story], processor: ProcessorMixin) -> list[dict]:
    """Decodes the videos once, as the processor does for a user, and keeps their patches (float16, to save memory)."""
    examples = []
    for path, story in zip(tqdm(paths, desc="reading videos", unit="video"), told):
        inputs = processor(text="<|vision_start|><|vision_end|>", videos=[path], fps=FPS, return_tensors="pt")
        examples.append(
            {
                "pixels": inputs["pixel_values_videos"].half(),
                "grid": inputs["video_grid_thw"],
                "answers": {kind: story.answer(kind) for kind in QUESTIONS},
            }
        )
    return examples


class Collator:
    """Examples to a padded batch; only the answers are labelled."""

    def __init__(self, processor: ProcessorMixin, seed: int):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.rng = random.Random(seed)
        self.header = self.tokenizer("<|im_start|>assistant\n").input_ids
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.vision_start = self.tokenizer.convert_tokens_to_ids("<|vision_start|>")

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        shown = [self.rng.random() >= WITHOUT_VIDEO for _ in examples]
        texts = [self._text(example["answers"], with_video) for example, with_video in zip(examples, shown)]
        batch = dict(self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))
        labels = [answer_labels(ids, self.header, self.end) for ids in batch["input_ids"].tolist()]
        batch["labels"] = torch.tensor(labels)
        batch["mm_token_type_ids"] = 2 * (batch["input_ids"] == self.vision_start).long()
        if any(shown):
            seen = [example for example, with_video in zip(examples, shown) if with_video]
            batch["pixel_values_videos"] = torch.cat([example["pixels"] for example in seen]).float()
            batch["video_grid_thw"] = torch.cat([example["grid"] for example in seen])
        return batch

    def _text(self, answers: dict[str, str], with_video: bool) -> str:
        kinds = self.rng.sample(list(answers), len(answers))
        chat = messages([QUESTIONS[kind] for kind in kinds], [answers[kind] for kind in kinds], with_video)
        return self.processor.apply_chat_template(chat)


def answer_labels(ids: list[int], header: list[int], end: int) -> list[int]:
    """`ids` where the assistant speaks (its end of turn included), `IGNORED` elsewhere."""
    labels, position = [IGNORED] * len(ids), 0
    while position < len(ids):
        if ids[position : position + len(header)] != header:
            position += 1
            continue
        position += len(header)
        stop = ids.index(end, position) + 1
        labels[position:stop] = ids[position:stop]
        position = stop
    return labels


def fine_tune(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: list[dict],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """Trains `model` in place; returns the mean loss of the steps logged last."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=len(examples) >= batch_size,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several, Trainer would cut a batch's patches anywhere
    trainer = Trainer(model, arguments, data_collator=Collator(processor, seed), train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1]
