"""Samples to a batch: rows padded on the right, or all of them one after the other in a single row.

What is unusual: packed, a row says where its samples end in `packed_lengths`, from which the model makes attention that
stays within a sample and Mamba states that start anew; positions start anew too, and no sample predicts the first token
of the next. Patches are concatenated either way: the n-th item belongs to the n-th `<|vision_start|>`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .encoding import IGNORED, ConversationEncoder


_TEXT = {"labels": IGNORED, "mm_token_type_ids": 0}
_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


class Collator:
    """Makes batches for `Trainer`, or for TRL's `SFTTrainer` with `dataset_kwargs={"skip_prepare_dataset": True}`.

    Args:
        encoder: turns examples into samples; samples that are encoded already are taken as they are. It runs where the
            collator runs, which is in the DataLoader's workers.
        packing: put all samples of a batch into one row.

    Raises (when called):
        ExampleError, VideoReadError: an example is unsound; `TrainingStream` skips such examples instead.
    """

    def __init__(self, encoder: ConversationEncoder, *, packing: bool = False):
        self.encoder, self.packing = encoder, packing
        self.tokenizer = encoder.processor.tokenizer

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        samples = [example if "input_ids" in example else self.encoder(example) for example in examples]
        if self.packing:
            return pack(samples)
        padding = self.tokenizer.pad_token_id
        return pad(samples, self.tokenizer.eos_token_id if padding is None else padding)


def pad(samples: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows padded on the right: input_ids, attention_mask, labels and mm_token_type_ids (B, N), and the media."""
    fills = {"input_ids": pad_token_id, **_TEXT}
    batch = {
        name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }
    ones = [torch.ones_like(sample["input_ids"]) for sample in samples]
    return batch | {"attention_mask": pad_sequence(ones, batch_first=True)} | _media(samples)


def pack(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """One row: input_ids, position_ids, labels, mm_token_type_ids (1, N); packed_lengths, a list; and the media."""
    row = {name: torch.cat([sample[name] for sample in samples])[None] for name in ("input_ids", *_TEXT)}
    lengths = [len(sample["input_ids"]) for sample in samples]
    row["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    row["labels"][row["position_ids"] == 0] = IGNORED
    return row | {"packed_lengths": lengths} | _media(samples)


def _media(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found = {name: [sample[name] for sample in samples if name in sample] for name in _MEDIA}
    return {name: torch.cat(values) for name, values in found.items() if values}


def fill_packs(sizes: Sequence[tuple[int, ...]], limits: tuple[int | None, ...], rows: int | None) -> list[list[int]]:
    """First fit, the largest first: which samples go together so that no pack exceeds a limit.

    Args:
        sizes: of each sample, in as many units as there are limits (video tokens, text tokens).
        limits: of a pack in each unit, None for none. A sample that exceeds one by itself gets a pack of its own.
        rows: samples in a pack at most, None for any number.

    Returns:
        Indices into `sizes`, each exactly once; the same for the same arguments.
    """
    packs: list[tuple[list[int], list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda index: (*(-size for size in sizes[index]), index)):
        for members, used in packs:
            sums = [a + b for a, b in zip(used, sizes[index])]
            fits = all(limit is None or total <= limit for total, limit in zip(sums, limits))
            if fits and (rows is None or len(members) < rows):
                members.append(index)
                used[:] = sums
                break
        else:
            packs.append(([index], list(sizes[index])))
    return [members for members, _ in packs]
