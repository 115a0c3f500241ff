"""Training with transformers' own Trainer: the collator of this package makes batches of conversations about videos.

    python examples/plain_trainer.py runs/demo talks.jsonl --output_dir runs/plain --max_steps 100
    python examples/plain_trainer.py runs/demo talks.jsonl --output_dir runs/plain --report_to wandb --run_name talks

The options are those of `TrainingArguments`; with `--report_to wandb` the losses go to Weights & Biases. What
`vamba finetune` adds is what long runs need: packing, broken examples left out, resuming in the middle of an epoch.
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, Trainer, TrainingArguments

from vamba.data import Collator, ConversationEncoder


path, data, *options = sys.argv[1:]
(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(options)
arguments.remove_unused_columns = False  # the collator reads the rows as they are

model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)  # `--bf16` computes in bfloat16
processor = AutoProcessor.from_pretrained(path)
rows = load_dataset("json", data_files=data, split="train")
collator = Collator(ConversationEncoder(processor, media_root=str(Path(data).parent)))  # videos lie beside the file

trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, processing_class=processor)
trainer.train()
trainer.save_model()
print("the trained model is in", arguments.output_dir)
