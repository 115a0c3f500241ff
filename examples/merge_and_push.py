"""Add an adapter to the weights that it was trained on, keep the result in a folder, and put it on the Hub.

    python examples/merge_and_push.py runs/adapter runs/merged
    python examples/merge_and_push.py runs/adapter runs/merged name/of-repository

An adapter of QLoRA is added to the whole weights, not to those of four bits. Without a repository nothing is uploaded.
"""

import sys

from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import vamba


adapter, folder, *repository = sys.argv[1:]
base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
processor = AutoProcessor.from_pretrained(base)

model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(folder)
processor.save_pretrained(folder)
print("the merged model is in", folder)

if repository:  # weights, code and a model card, as one commit; see the login of `hf auth login`
    print(vamba.hub.push_to_hub(model, processor, repository[0], private=True))
