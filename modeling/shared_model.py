"""What the two models have in common: where media stand in a text, the tower's passes over frames, logits and loss.

Shapes: B batch, N text tokens, D hidden.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .chunked_loss import chunked_causal_lm_loss
from .frame_streaming import MAX_CHUNK_FRAMES, normalized
from .media import MediaItem, split_frames
from .ranks import calls_are_shared
from .weights_fingerprint import WeightsFingerprint, are_same_weights


logger = logging.get_logger(__name__)


def flattened_lengths(
    position_ids: Tensor | None, attention_mask: Tensor | dict | None, cu_seq_lens: Tensor | None
) -> list[int] | None:
    """Lengths of the samples that a collator without padding has put into one row; None if there is but one sample.

    They are told by `cu_seq_lens` or by positions that start anew within the row, (1, N), or (3 or 4, 1, N) as for
    Qwen2-VL. Positions that come with padding tell nothing, and while a graph is traced nobody can look at them.

    Raises:
        ValueError: positions start anew in one of several rows.
    """
    given = position_ids if cu_seq_lens is None else cu_seq_lens
    if given is None or given.shape[-1] < 2 or is_tracing(given):
        return None
    if cu_seq_lens is not None:
        return cu_seq_lens.diff().tolist()
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or not attention_mask.all()):
        return None
    text_BN = position_ids[0] if position_ids.dim() == 3 else position_ids
    anew_BN = text_BN.diff() < 1
    if not anew_BN.any():
        return None
    B, N = text_BN.shape
    if B > 1:
        raise ValueError(
            f"position_ids start anew within {int(anew_BN.any(1).sum())} of {B} rows: samples put together without "
            "padding have to be a single row, with their packed_lengths or these positions."
        )
    borders = [0, *(anew_BN[0].nonzero().flatten() + 1).tolist(), N]
    return [end - start for start, end in pairwise(borders)]


class VideoModelMixin:
    """For a `PreTrainedModel` with a `visual` tower and a `language_model` that embeds tokens."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def media_starts(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, N), True at each `<|vision_start|>`; recognised by its embedding where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.vision_start_token_id
        token = torch.tensor(self.config.vision_start_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def check_weights(self, memory: Cache) -> str | None:
        """The fingerprint of the weights that make a memory of video; None for a new memory in training, where weights
        change with every step, and while torch compiles or exports.

        Raises:
            ValueError: the memory was made by others.
        """
        made_by = getattr(memory, "made_by", None)
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():  # after a step of an optimizer that counts up no version
            self._forget_fingerprint()
        if self.training and made_by is None:
            return None
        fingerprint = vars(self).setdefault("_fingerprint", WeightsFingerprint()).of(self.modules_that_make_memories())
        if made_by is not None and not are_same_weights(made_by, fingerprint):
            raise ValueError(
                "The memory was made with other weights than the model has now (another checkpoint, another adapter, "
                "or training since): encode the video again with the model that is asked."
            )
        return fingerprint

    def _forget_fingerprint(self) -> None:
        vars(self).pop("_fingerprint", None)

    def train(self, mode: bool = True) -> nn.Module:
        self._forget_fingerprint()
        return super().train(mode)

    def shares_calls(self, tokens: int) -> bool:
        """`ranks.calls_are_shared`; for a single token what it was before, as that looks at all parameters."""
        if tokens > 1 or "_shares_calls" not in vars(self):
            self._shares_calls = calls_are_shared(self)
        return self._shares_calls

    def warn_of_unseen_media(self, input_ids: Tensor | None, *memories: Cache) -> None:
        """Where text has marks of media and nothing was seen: others' collators leave media out and keep the marks.

        Single tokens, as in decoding, are not looked at, as that would wait for the device.
        """
        if input_ids is None or input_ids.shape[1] < 2 or input_ids.is_meta or torch.compiler.is_compiling():
            return
        if any(memory.video_length or memory.get_seq_length() for memory in memories):
            return
        starts, ends = (input_ids == getattr(self.config, f"vision_{side}_token_id") for side in ("start", "end"))
        if (starts[:, :-1] & ends[:, 1:]).any():
            logger.warning_once(
                "The text holds <|vision_start|><|vision_end|>, but neither images, videos nor a memory were given: "
                "the model sees nothing there. Pass on all that the processor returns; in training, a collator that "
                "knows videos, as vamba.data.Collator does."
            )

    @property
    def tower_trains(self) -> bool:
        """Whether gradients have to go through the tower; to its merger, which comes last, they come without."""
        return any(p.requires_grad for name, p in self.visual.named_parameters() if not name.startswith("merger."))

    def enable_input_require_grads(self) -> None:
        """Of the embeddings of text, of frames where the tower trains, and of media where checkpoints are reentrant.

        transformers' own asks for those of frames always: through a frozen tower a graph would be kept for nothing.
        Gradients of the media's embeddings, which nobody reads, would take as much memory as the embeddings.
        """

        def frames(module, args, output):
            output.requires_grad_(output.requires_grad or self.tower_trains)

        def media(module, args, output):
            if self._checkpoints_are_reentrant:
                output.pooler_output.requires_grad_()

        self.disable_input_require_grads()
        self._require_grads_hooks = [
            self.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_()),
            self.visual.get_input_embeddings().register_forward_hook(frames),
            self.visual.register_forward_hook(media),
        ]

    @property
    def _checkpoints_are_reentrant(self) -> bool:
        """Whether a layer is checkpointed only if something that enters it wants a gradient: torch's default."""
        layers = (module for module in self.modules() if getattr(module, "gradient_checkpointing", False))
        functions = (getattr(layer, "_gradient_checkpointing_func", None) for layer in layers)
        return any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions)

    @property
    def pass_frames(self) -> int:
        """Temporal patches that the tower takes at once."""
        return MAX_CHUNK_FRAMES // self.config.vision_config.temporal_patch_size

    def count_passes(self, items: Iterable[MediaItem]) -> int:
        return ceil(sum(item.t for item in items) / self.pass_frames)

    def tower_tokens(
        self, items: list[MediaItem], parts: list[Tensor], passes: int
    ) -> tuple[list[Tensor], Tensor | None]:
        """The tokens of the items, run by run of frames, after `passes` passes of the tower.

        Of these as many are for black frames as this rank needs less than another; what they give is zero, to be added
        to something that backward goes through, or None. `parts` holds the items' patches in order, wherever cut.
        """
        tokens = [part for taken in self._tower_passes(items, parts) for part in self._tower_pass(*taken)]
        return tokens, self.black_passes(passes - self.count_passes(items))

    def black_passes(self, count: int) -> Tensor | None:
        """Zero, after so many passes of the smallest frame through the tower; None for none."""
        vision, side = self.config.vision_config, self.smallest_side
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        black = torch.zeros(side**2, numbers, device=self.visual.device, dtype=self.visual.dtype)
        grid = torch.tensor([[1, side, side]])
        return sum(0 * self._tower_pass(black, grid)[0].sum() for _ in range(count)) if count > 0 else None

    def _tower_passes(self, items: list[MediaItem], parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches and grid, on the CPU, of what the tower takes at once; `parts` are the items' patches in order.

        A chunk may be of any size where gradients are recorded: the tower, mostly frozen then, takes it in passes.
        """
        if not items:
            return
        if len({part.dtype for part in parts}) > 1:
            parts = [normalized(part, self.config) for part in parts]
        patches, start = parts[0] if len(parts) == 1 else torch.cat(parts), 0
        for (taken,) in split_frames([items], self.pass_frames):
            end = start + sum(item.num_patches for item in taken)
            yield patches[start:end], torch.tensor([[item.t, item.h, item.w] for item in taken])
            start = end


class VideoHeadMixin:
    """For a `PreTrainedModel` whose `model` has a `VideoModelMixin`, with an `lm_head`."""

    def get_image_features(self, pixel_values: torch.FloatTensor, image_grid_thw: torch.LongTensor, **kwargs):
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.FloatTensor, video_grid_thw: torch.LongTensor, **kwargs):
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def enable_input_require_grads(self) -> None:
        self.model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        self.model.disable_input_require_grads()

    def _logits_and_loss(
        self, hidden_BND: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor, skip_logits: bool, **kwargs
    ) -> dict[str, Tensor | None]:
        """`logits` and `loss` as forward returns them: with `skip_logits` and labels no logits but the loss."""
        vocab_size = self.config.text_config.vocab_size
        if skip_logits and labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = chunked_causal_lm_loss(self.lm_head, hidden_BND, labels, vocab_size, items)
            return {"logits": None, "loss": loss}
        logits, loss = self.lm_head(slice_logits_to_keep(hidden_BND, logits_to_keep)), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return {"logits": logits, "loss": loss}


__all__ = ["VideoHeadMixin", "VideoModelMixin", "flattened_lengths"]
