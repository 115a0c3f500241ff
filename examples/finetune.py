"""Fine-tuning by a recipe: what `vamba finetune` does, to read and to change.

    python examples/finetune.py vamba_lora --model_name_or_path vamba-7b --datasets talks.jsonl --output_dir runs/talks
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/finetune.py vamba_stage2 --datasets ...
    python examples/finetune.py my_recipe.yaml --resume

A recipe is a YAML file or the name of a shipped one (vamba/recipes); `--key value` overrides what it says.
"""

import sys

from vamba.training import load_recipe, make_trainer, prepare, save


name, *rest = sys.argv[1:]
recipe = load_recipe(name, [argument for argument in rest if argument != "--resume"])

prepared = prepare(recipe, resume="--resume" in rest)  # all checks, before the model is loaded
trainer = make_trainer(prepared)  # a transformers Trainer
trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)

if trainer.stopped:
    sys.exit("stopped by SIGTERM, after a save; go on with --resume")
print("the trained model is in", save(trainer, recipe))
