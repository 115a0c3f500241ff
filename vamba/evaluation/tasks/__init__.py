"""Tasks for lmms-eval: `lmms-eval --include_path "$(python -m vamba.evaluation.tasks)" --tasks vamba_choices`."""
