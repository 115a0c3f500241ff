"""LoRA with TRL's SFTTrainer; or QLoRA, which is LoRA on weights that bitsandbytes keeps in four bits.

    python examples/trl_lora.py runs/demo talks.jsonl --output_dir runs/adapter --max_steps 100
    python examples/trl_lora.py runs/demo talks.jsonl --output_dir runs/adapter --max_steps 100 --load_in_4bit

The options are those of TRL's `SFTConfig` and `ModelConfig`, such as `--lora_r`. `vamba ask --model runs/adapter` asks
the adapter, and examples/merge_and_push.py makes a model of it.
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from vamba.data import Collator, ConversationEncoder
from vamba.training.model import ADAPTED


path, data, *options = sys.argv[1:]
arguments, chosen = TrlParser((SFTConfig, ModelConfig)).parse_args_and_config(options)
arguments.dataset_kwargs = {"skip_prepare_dataset": True}  # TRL prepares text and images only
arguments.remove_unused_columns = False  # the collator reads the rows as they are
chosen.use_peft, chosen.lora_target_modules = True, ADAPTED  # all projections outside the vision tower

quantization = get_quantization_config(chosen)
model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", quantization_config=quantization)
processor = AutoProcessor.from_pretrained(path)
rows = load_dataset("json", data_files=data, split="train")
collator = Collator(ConversationEncoder(processor, media_root=str(Path(data).parent)))  # videos lie beside the file

trainer = SFTTrainer(
    model,
    arguments,
    data_collator=collator,
    train_dataset=rows,
    processing_class=processor,
    peft_config=get_peft_config(chosen),
)
trainer.train()
trainer.save_model()
print("the adapter is in", arguments.output_dir)
