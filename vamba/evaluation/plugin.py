"""What lmms-eval finds through the entry point group `lmms_eval.models`: `--model vamba`, for both models."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vamba",
        chat_class_path="vamba.evaluation.harness.Vamba",
        simple_class_path="vamba.evaluation.harness.SimpleVamba",
        aliases=("video_ma2mba",),
    )
