"""How much arithmetic a training step needs, for the model FLOPs utilisation (MFU) in the log.

What is unusual: matrix products are counted from the shapes of the weights (two operations per weight and token that
passes it), so any vision tower is counted right; attention and the state space scan are added from the configuration.
Forward counts once; backward once more for the gradients that pass through a part, and once for those of its weights as
far as they train. What checkpointing computes a second time is not useful work and is not counted.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig


_VISION = (r"(^|\.)visual\.(?!merger\.|.*position_embedding)", "patches")
_HEAD = (r"(^|\.)lm_head\.", "labels")
# kind of model -> part -> (parameters, what passes them); in the order in which gradients do not pass back further
_PARTS = {
    "vamba": {
        "vision": _VISION,
        "merger": (r"(^|\.)visual\.merger\.", "video"),
        "mamba": (r"(^|\.)video_encoder\.", "video"),
        "text": (r"(^|\.)language_model\.(?!embed_tokens\.)", "text"),
        "head": _HEAD,
    },
    "video_ma2mba": {
        "vision": _VISION,
        "merger": (r"(^|\.)projector\.", "video"),
        "mamba": (r"(^|\.)language_model\.(?!embed_tokens\.)", "stream"),
        "head": _HEAD,
    },
}
# Dense half-precision TFLOP/s by name of the GPU, from NVIDIA's data sheets.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "4090": 165}
Grid = tuple[int, int, int]


class FlopsModel:
    """Counts the operations of a training step.

    Args:
        config: a `VambaConfig` or a `VideoMa2mbaConfig`.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config, self.parts = config, _PARTS[config.model_type]
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        self.weights = dict.fromkeys(self.parts, 0)
        names = dict(model.named_parameters(remove_duplicate=False))  # a tied head does its work all the same
        for name, parameter in names.items():
            if parameter.dim() > 1 and (part := self._part(name)) is not None:
                self.weights[part] += parameter.numel()
        self.factors = dict.fromkeys(self.parts, 1.0)

    def trains(self, model: nn.Module) -> None:
        """Notes what of `model` (of this configuration, adapters or not) trains, so that `step` counts its backward."""
        total, training = dict.fromkeys(self.parts, 0), dict.fromkeys(self.parts, 0)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if (part := self._part(name)) is not None:
                size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves the parameter itself empty
                total[part] += size
                training[part] += size * parameter.requires_grad
        passes = False
        for part in self.parts:
            passes = passes or training[part] > 0
            self.factors[part] = 1.0 + passes + training[part] / max(total[part], 1)

    def step(self, samples: Sequence[tuple[int, int, Sequence[Grid]]]) -> float:
        """Operations of a step over `samples`: text tokens, labelled tokens and the grids (t, h, w) of the media."""
        return sum(self.factors[part] * flops for sample in samples for part, flops in self.forward(*sample).items())

    def forward(self, text: int, labels: int, grids: Sequence[Grid]) -> dict[str, float]:
        """Operations of a forward pass over one sample, by part."""
        vision, decoder, mamba = self.config.vision_config, self.config.text_config, self.config.mamba_config
        patches = sum(math.prod(grid) for grid in grids)
        video = patches // vision.spatial_merge_size**2
        passing = {"patches": patches, "video": video, "text": text, "stream": text + video, "labels": labels}
        flops = {part: 2.0 * self.weights[part] * passing[what] for part, (_, what) in self.parts.items()}
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers - 1
        flops["vision"] += sum(4.0 * t * (h * w) ** 2 * width * depth for t, h, w in grids)
        scans = decoder.num_hidden_layers
        if "text" in flops:
            attended = text / 2 + video  # causal among the text
            flops["text"] += 4.0 * text * attended * decoder.hidden_size * decoder.num_hidden_layers
            scans -= 1
        inner, state = mamba.intermediate_size, mamba.state_size
        scan = mamba.chunk_size * (mamba.n_groups * state + inner) + 2 * state * inner
        flops["mamba"] += 2.0 * passing[self.parts["mamba"][1]] * scan * scans
        return flops

    def _part(self, name: str) -> str | None:
        return next((part for part, (pattern, _) in self.parts.items() if re.search(pattern, name)), None)


def peak_flops(device: torch.device) -> float | None:
    """Operations per second that the device could do in half precision, if it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
