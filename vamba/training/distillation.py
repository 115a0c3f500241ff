"""Distillation from a Qwen2-VL: its next-token distribution on what the assistant says, matched by the student.

What is unusual: the two models write media differently. For the teacher, each `<|vision_start|>` of the student's text
is followed by as many placeholders as the item has tokens, and the same patches are handed on; then the positions of
the assistant's tokens are paired. The teacher sees one sample at a time, so packed rows need nothing from it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


_KINDS = {
    1: ("image_token_id", "pixel_values", "image_grid_thw"),
    2: ("video_token_id", "pixel_values_videos", "video_grid_thw"),
}


class Distillation:
    """Adds weight * temperature^2 * KL(teacher || student) to the loss; see `Trainer`'s `compute_loss_func`.

    Args:
        teacher: a Qwen2-VL. config: the student's.
    """

    def __init__(self, teacher: PreTrainedModel, config: PreTrainedConfig, *, weight: float, temperature: float):
        self.teacher, self.config = teacher.eval().requires_grad_(False), config
        self.weight, self.temperature = weight, temperature
        self._teacher_logits = torch.empty(0)

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Asks the teacher, and makes the student return logits where something is to be predicted only."""
        chosen_BN = inputs["labels"][:, 1:] != -100
        inputs = {**inputs, "logits_to_keep": chosen_BN.any(0).nonzero()[:, 0]}
        self._teacher_logits = self._ask(inputs)
        return inputs

    def loss(self, outputs, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """Cross-entropy plus divergence over the targets, summed and divided by `num_items_in_batch`."""
        kept = (labels[:, 1:] != -100).any(0)
        targets_BK = labels[:, 1:][:, kept]
        chosen_BK = targets_BK != -100
        student_TV = outputs.logits[chosen_BK].float()
        loss = nn.functional.cross_entropy(student_TV, targets_BK[chosen_BK], reduction="sum")
        student_TV, teacher_TV = (
            torch.log_softmax(logits / self.temperature, -1) for logits in (student_TV, self._teacher_logits.float())
        )
        divergence = nn.functional.kl_div(student_TV, teacher_TV, reduction="sum", log_target=True)
        items = chosen_BK.sum() if num_items_in_batch is None else num_items_in_batch
        return (loss + self.weight * self.temperature**2 * divergence) / items

    @torch.no_grad()
    def _ask(self, inputs: dict[str, Any]) -> Tensor:
        """The teacher's logits for each target of the batch, row by row, (targets, vocabulary)."""
        self.teacher.to(inputs["input_ids"].device)
        used = dict.fromkeys(_KINDS, (0, 0))  # items and patches of each kind that earlier samples took
        logits = []
        for ids_N, types_N, labels_N in _samples(inputs):
            sample, used, places_N = self._teacher_inputs(ids_N, types_N, inputs, used)
            keep = places_N[:-1][labels_N[1:] != -100]
            logits.append(self.teacher(**sample, logits_to_keep=keep, use_cache=False).logits[0])
        return torch.cat(logits)

    def _teacher_inputs(self, ids_N: Tensor, types_N: Tensor, inputs: dict[str, Any], used: dict) -> tuple:
        """One sample as the teacher reads it, what of the media is used then, and where the student's tokens went."""
        repeats_N = torch.ones_like(ids_N)
        placeholders: dict[int, tuple[int, int]] = {}
        sample: dict[str, Any] = {}
        for kind, (token, pixels, grid) in _KINDS.items():
            starts = ((ids_N == self.config.vision_start_token_id) & (types_N == kind)).nonzero()[:, 0]
            if not len(starts):
                continue
            items, patches = used[kind]
            sample[grid] = inputs[grid][items : items + len(starts)]
            counts = sample[grid].prod(1)
            sample[pixels] = inputs[pixels][patches : patches + int(counts.sum())]
            repeats_N[starts] += counts // self.config.vision_config.spatial_merge_size**2
            used = {**used, kind: (items + len(starts), patches + int(counts.sum()))}
            placeholders |= {int(start): (kind, getattr(self.teacher.config, token)) for start in starts}
        ends_N = repeats_N.cumsum(0)
        places_N = torch.cat([ends_N.new_zeros(1), ends_N[:-1]])
        ids_M = ids_N.repeat_interleave(repeats_N)
        types_M = torch.zeros_like(ids_M)
        for start, (kind, token_id) in placeholders.items():
            span = slice(int(places_N[start]) + 1, int(ends_N[start]))
            ids_M[span], types_M[span] = token_id, kind
        # a token's successor is predicted at the last place that is its own
        sample |= {"input_ids": ids_M[None], "mm_token_type_ids": types_M[None]}
        return sample, used, ends_N - 1


def _samples(inputs: dict[str, Any]):
    """(input_ids, mm_token_type_ids, labels) of each sample of a padded or packed batch."""
    names = ("input_ids", "mm_token_type_ids", "labels")
    if "packed_lengths" in inputs:
        yield from zip(*(inputs[name][0].split(list(inputs["packed_lengths"])) for name in names))
        return
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        yield tuple(inputs[name][row][mask] for name in names)


def teacher_mismatch(config: PreTrainedConfig, student: PreTrainedConfig) -> str | None:
    """Why a model of configuration `config` cannot teach one of configuration `student`; None if it can."""
    if config.model_type != "qwen2_vl":
        return f"a {config.model_type}; accepted: a qwen2_vl"
    theirs, ours = config.text_config.vocab_size, student.text_config.vocab_size
    if theirs != ours:
        return f"a model of {theirs} tokens; accepted: one with the student's {ours}"
    theirs, ours = config.vision_config, student.vision_config
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        if getattr(theirs, name) != getattr(ours, name):
            return f"a model with {name} {getattr(theirs, name)}; accepted: the student's {getattr(ours, name)}"
    return None
