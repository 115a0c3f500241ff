"""What the two models have in common: embeddings, positions of text, the tower's passes over frames, logits and loss.

What is unusual: only positions with a label pass the language model head, a chunk of them at a time, and a chunk's
logits are computed again in the backward pass (`chunked_causal_lm_loss`). Same idea as Liger's fused linear
cross-entropy, in PyTorch alone: the head is called as a module, so adapters on it, FSDP and ZeRO work as ever.

Shapes: B batch, N text tokens, T targets, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from itertools import accumulate
from math import ceil

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.import_utils import is_tracing

from .media import (
    MAX_CHUNK_FRAMES,
    MediaItem,
    chunk_patches,
    list_with_rows,
    load_ahead,
    normalized,
    split_frames,
    to_device,
)
from .memory_files import WeightsFingerprint, are_same_weights
from .ranks import agree_on_calls, calls_are_shared, largest_of_ranks, weights_are_sharded


logger = logging.get_logger(__name__)

LOGITS_AT_ONCE = 2**26  # numbers in one chunk of logits: 256 MiB in float32


class VideoModelMixin:
    """For a `PreTrainedModel` with a `visual` tower and a `language_model` that embeds tokens."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def embedded(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """`inputs_embeds`, or else those of the ids. Raises ValueError where neither is given or is a batch of text."""
        if inputs_embeds is not None:
            check_text("inputs_embeds", inputs_embeds, attention_mask)
            return inputs_embeds
        if input_ids is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        check_text("input_ids", input_ids, attention_mask, self.config.text_config.vocab_size)
        return self.get_input_embeddings()(input_ids)

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
        if tokens > 1 or getattr(self, "_shares_calls", None) is None:
            self._shares_calls = calls_are_shared(self)
        return self._shares_calls

    def warn_of_unseen_media(self, input_ids: Tensor | None, memory: Cache) -> None:
        """Where text comes with marks of media but without media, which its memory has not seen before either: others'
        collators leave media out and keep the marks.

        Single tokens, as in decoding, are not looked at, nor is their memory: either would wait for the device.
        """
        if input_ids is None or input_ids.shape[1] < 2 or input_ids.is_meta or torch.compiler.is_compiling():
            return
        if memory.video_length or memory.get_seq_length():
            return
        starts, ends = (input_ids == getattr(self.config, f"vision_{side}_token_id") for side in ("start", "end"))
        if (starts[:, :-1] & ends[:, 1:]).any():
            logger.warning_once(
                "The text holds <|vision_start|><|vision_end|>, but neither images, videos nor a memory were given: "
                "the model sees nothing there. Pass on all that the processor returns; in training, a collator that "
                "knows videos, as vamba.data.Collator does."
            )

    def encode_video(
        self,
        pixel_values_videos: Tensor,
        video_grid_thw: torch.LongTensor,
        memory: Cache | None = None,
        *,
        rows: list[int] | None = None,
        continue_video: bool | None = None,
        chunk_frames: int | None = None,
    ) -> Cache:
        """Encodes video into a new memory, or appends it to one; any split of the frames gives the same result.

        A `VideoMemory` (Vamba) is read by any prompt. A `StateMemory` (Video-Ma2mba) has read one `<|vision_start|>`
        `<|vision_end|>` for each video, with which a prompt about them begins, as the chat template writes it.

        Args:
            pixel_values_videos: patches as the video processor makes them, (sum of t * h * w, patch size); as uint8
                (`do_rescale=False, do_normalize=False`) they take a quarter of the memory and are normalised here.
                They may stay on the CPU: each chunk is copied while the one before is computed.
            video_grid_thw: (t, h, w) of each video in patches, (number of videos, 3).
            memory: what was seen before; it is extended in place and returned, unchanged if anything is raised. None
                starts anew.
            rows: for each video the row of the memory it belongs to; None puts all into row 0.
            continue_video: whether the first video of a row continues its last one. None: Vamba does so if both have
                the same size, which matters only with `cross_attn_use_position_embeddings`; Video-Ma2mba if that video
                was the last it saw.
            chunk_frames: frames that go through the model at once, which bounds the activations; None means 128, or
                fewer where the GPU's free memory asks for it, or all while gradients are recorded.

        Raises:
            ValueError: patches, grid, rows and memory that do not fit each other.
        """
        if chunk_frames is not None and (type(chunk_frames) is not int or chunk_frames < 1):
            raise ValueError(f"{chunk_frames=!r:.80} must be a number of frames from 1 on, or None.")
        videos = list_with_rows("video", pixel_values_videos, video_grid_thw, rows)
        return self._encode_videos(memory, videos, {"video": pixel_values_videos}, continue_video, chunk_frames)

    def encode_images(
        self,
        pixel_values: Tensor,
        image_grid_thw: torch.LongTensor,
        memory: Cache | None = None,
        *,
        rows: list[int] | None = None,
    ) -> Cache:
        """`encode_video` of images: patches as the image processor makes them, and (1, h, w) of each."""
        images = list_with_rows("image", pixel_values, image_grid_thw, rows)
        return self._encode_videos(memory, images, {"image": pixel_values}, False, None)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, image_grid_thw: torch.LongTensor, **kwargs):
        """`get_video_features` of images, each of which is one frame: (1, height, width) in patches."""
        return self.get_video_features(pixel_values, image_grid_thw, return_dict=True, **kwargs)

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

    def media_tokens(
        self, chunks: list[list[MediaItem]], pixels: dict[str, Tensor], whole: bool
    ) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        """The tokens of each chunk's items, in order, wherever they are cut, while the next chunk is being loaded.

        Beside them comes zero for the frames that only other ranks have (see `ranks`), to be added to something that
        backward goes through, or None; at the end by itself for each chunk that only they have.

        Args:
            pixels: the patches of all images and of all videos, by kind.
            whole: nothing was cut into chunks; patches are then copied to the device pass by pass.
        """
        check_patches(self.config.vision_config, chunks, pixels)
        needed = [ceil(sum(item.t for item in items) / self.pass_frames) for items in chunks]
        passes, device = agree_on_calls(self, needed, self.visual.device), self.visual.device

        def load(items: list[MediaItem]) -> list[Tensor]:
            return [part if whole else to_device(part, device) for part in chunk_patches([items], pixels)]

        loaded = load_ahead(chunks, load, device)
        for index, called in enumerate(passes):
            items, patches = next(loaded, ([], []))
            tokens = [part for taken in self._tower_passes(items, patches) for part in self._tower_pass(*taken)]
            yield tokens, self.black_passes(called - (needed[index] if index < len(needed) else 0))

    def black_passes(self, count: int) -> Tensor | None:
        """Zero, after so many passes of the smallest frame, in black, through the tower; None for none."""
        if count <= 0:
            return None
        vision, side = self.config.vision_config, self.smallest_side
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        black = torch.zeros(side**2, numbers, device=self.visual.device, dtype=self.visual.dtype)
        grid = torch.tensor([[1, side, side]])
        return sum(0 * self._tower_pass(black, grid)[0].sum() for _ in range(count))

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
    """For a `PreTrainedModel`: a `_model_class`, which has a `VideoModelMixin`, with an `lm_head`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = self._model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: torch.FloatTensor, image_grid_thw: torch.LongTensor, **kwargs):
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos: torch.FloatTensor, video_grid_thw: torch.LongTensor, **kwargs):
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    def enable_input_require_grads(self) -> None:
        self.model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        self.model.disable_input_require_grads()

    @torch.no_grad()
    def encode_video(self, *args, **kwargs) -> Cache:
        """The model's `encode_video` without gradients."""
        return self.model.encode_video(*args, **kwargs)

    @torch.no_grad()
    def encode_images(self, *args, **kwargs) -> Cache:
        """The model's `encode_images` without gradients."""
        return self.model.encode_images(*args, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """GenerationMixin's. Raises ValueError for a prompt that is no batch of text."""
        prompt = kwargs.get("inputs_embeds")
        if prompt is None:
            ids = inputs if inputs is not None else kwargs.get("input_ids")
            if ids is not None:
                check_text("input_ids", ids, kwargs.get("attention_mask"), self.config.text_config.vocab_size)
        elif isinstance(prompt, Tensor) and prompt.dim() != 3:
            check_text("inputs_embeds", prompt, None)
        types = kwargs.get("mm_token_type_ids")
        if isinstance(types, Tensor) and types.dim() != 2:
            raise ValueError(f"mm_token_type_ids is {list(types.shape)}; give (B, N), as the processor returns it.")
        return super().generate(inputs, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        packed_lengths: list[int] | torch.LongTensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | ModelOutput:
        r"""Logits for text about images and videos, and with `labels` the loss of predicting each next token.

        Args:
            input_ids: (B, N) int64; `inputs_embeds` (B, N, D) may come in their place.
            attention_mask: (B, N), 0 at padding, for the tokens given or for all since the memory's first.
            position_ids: (B, N), or as for Qwen2-VL (3, B, N), of text only; a state (Video-Ma2mba) knows of none.
            past_key_values: a `VideoMemory` (Vamba) or `StateMemory` (Video-Ma2mba), or for Vamba any cache of text.
            labels: (B, N) int64, -100 where nothing is to be predicted.
            pixel_values, pixel_values_videos: patches of all images and of all videos, (sum of t * h * w, patch size).
            image_grid_thw, video_grid_thw: (number of items, 3) int64, the (t, h, w) of each in patches.
            mm_token_type_ids: (B, N), 1 at the `<|vision_start|>` of an image, 2 at that of a video; needed where a
                batch mixes the two.
            packed_lengths: for Vamba, one row of text consists of samples of these lengths, which see neither each
                other nor each other's media; the first label of each should be -100. Loss and gradients are those of
                the samples in a batch.
            logits_to_keep: how many of the last positions get logits, or which; 0 for all.
            skip_logits: with `labels`, compute the loss in chunks of positions, whose logits are never all held, and
                return none.

        Raises:
            ValueError: media, text and memory that do not fit each other; the message says how.

        Example:

        ```python
        >>> import vamba
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained("path/to/model")
        >>> processor = AutoProcessor.from_pretrained("path/to/model")
        >>> messages = [{"role": "user", "content": [
        ...     {"type": "video", "video": "talk.mp4", "fps": 1.0}, {"type": "text", "text": "Who speaks third?"}]}]
        >>> inputs = processor.apply_chat_template(
        ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        >>> answer = model.generate(**inputs, max_new_tokens=64)
        >>> processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            packed_lengths=packed_lengths,
            **kwargs,
        )
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        logits = self._logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, skip_logits, **kwargs)
        return self._output_class(**logits, **rest)

    def _logits_and_loss(
        self, hidden_BND: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor, skip_logits: bool, **kwargs
    ) -> dict[str, Tensor | None]:
        """`logits` and `loss` as forward returns them: with `skip_logits` and labels no logits but the loss."""
        vocab_size = self.config.text_config.vocab_size
        if labels is not None:
            check_labels(labels, hidden_BND, vocab_size)
        if skip_logits and labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = chunked_causal_lm_loss(self.lm_head, hidden_BND, labels, vocab_size, items)
            return {"logits": None, "loss": loss}
        logits, loss = self.lm_head(slice_logits_to_keep(hidden_BND, logits_to_keep)), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return {"logits": logits, "loss": loss}


def check_text(name: str, text: Tensor, attention_mask: Tensor | None, vocab_size: int | None = None) -> None:
    """Raises ValueError unless this is a batch of ids (B, N) or of embeddings (B, N, D), with a mask for it.

    Only ids that lie on the CPU are looked at, as a look at a GPU's would wait for it.
    """
    if not isinstance(text, Tensor):
        raise ValueError(f"{name} is {text!r:.80}; give a tensor.")
    if is_tracing(text):
        return
    dims, shape = (3 if vocab_size is None else 2), list(text.shape)
    if len(shape) != dims or 0 in shape or text.is_floating_point() != (dims == 3) or text.dtype == torch.bool:
        kind = "floats (B, N, D)" if dims == 3 else "integers (B, N)"
        raise ValueError(f"{name} is {shape} of {text.dtype}; give {kind} of at least one row and one token.")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() < 3:
        rows, tokens = attention_mask.shape if attention_mask.dim() == 2 else (0, 0)
        if rows != shape[0] or tokens < shape[1]:
            raise ValueError(f"attention_mask is {[rows, tokens]} for {name} of {shape[:2]}; give one number a token.")
    if vocab_size is not None and text.device.type == "cpu":
        least, most = torch.aminmax(text)
        if least < 0 or most >= vocab_size:
            raise ValueError(f"{name} holds {least} to {most}; the model knows the tokens 0 to {vocab_size - 1}.")


def check_labels(labels: Tensor, hidden_BND: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless there is one label for each token, and on the CPU each is a token or -100."""
    if is_tracing(labels):
        return
    if labels.shape != hidden_BND.shape[:2] or labels.is_floating_point() or labels.dtype == torch.bool:
        shape = list(hidden_BND.shape[:2])
        raise ValueError(
            f"labels are {list(labels.shape)} of {labels.dtype}; give integers {shape}, one for each token."
        )
    if labels.device.type == "cpu":
        least, most = torch.aminmax(labels)
        if (least < 0 and bool(((labels < 0) & (labels != -100)).any())) or most >= vocab_size:
            raise ValueError(
                f"labels hold {least} to {most}; give tokens from 0 to {vocab_size - 1}, or -100 for none."
            )


def check_patches(vision: PreTrainedConfig, chunks: list[list[MediaItem]], pixels: dict[str, Tensor]) -> None:
    """Raises ValueError unless patches and grids are such as the vision tower takes."""
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for item in {item._replace(start=0, first_frame=0, t=1) for items in chunks for item in items}:
        if (found := pixels[item.kind].shape[1:]) != (numbers,):
            raise ValueError(f"The patches of {item.kind}s are {list(found)} numbers; the model takes {numbers} each.")
        if item.h % vision.spatial_merge_size or item.w % vision.spatial_merge_size:
            raise ValueError(
                f"A grid of {item.h} x {item.w} patches; both must be multiples of {vision.spatial_merge_size}."
            )


def text_position_ids(
    position_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor, past_length: int
) -> Tensor:
    """(3, B, N) positions for M-RoPE: text counts text only, padding on the left not counted.

    `position_ids` may be given as (B, N) or, as for Qwen2-VL, (3, B, N), or (4, B, N) with those of the text first.
    """
    B, N = inputs_embeds.shape[:2]
    if position_ids is None:
        if attention_mask is not None and not isinstance(attention_mask, dict) and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -N:]
        else:
            position_ids = (torch.arange(N, device=inputs_embeds.device) + past_length).unsqueeze(0)
    if position_ids.dim() == 2:
        position_ids = position_ids.unsqueeze(0)
    return position_ids[-3:].expand(3, B, -1).to(inputs_embeds.device)


def positions_in_samples(lengths: list[int], device: torch.device) -> Tensor:
    """(1, N) positions of the tokens of samples packed into one row, each counted from zero."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def varlen_kwargs(lengths: list[int], device: torch.device) -> dict[str, Tensor | int]:
    """What keeps packed samples apart in flash attention, which takes no mask."""
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts) | dict.fromkeys(
        ("max_length_q", "max_length_k"), max(lengths)
    )


def chunked_causal_lm_loss(
    lm_head: nn.Module,
    hidden_BND: Tensor,
    labels_BN: Tensor,
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """The loss of transformers' `ForCausalLMLoss(lm_head(hidden_BND), labels_BN, ...)`, gradients included.

    Args:
        lm_head: maps (n, D) to logits (n, vocab_size).
        hidden_BND: what the head would be given. labels_BN: int64, `ignore_index` where nothing is to be predicted;
            the label of position n + 1 is the target of position n.
        num_items_in_batch: what the sum is divided by (targets of all batches of an optimizer step); None divides by
            this batch's own number of targets.
        chunk_tokens: targets whose logits exist at once; None for as many as make 2**26 numbers.

    Returns:
        A scalar, float32 for half-precision inputs.

    Source: `transformers.loss.loss_utils.ForCausalLMLoss`.
    """
    targets_BN = nn.functional.pad(labels_BN[:, 1:], (0, 1), value=ignore_index).to(hidden_BND.device)
    chosen_BN = targets_BN != ignore_index
    hidden_TD, targets_T = hidden_BND[chosen_BN], targets_BN[chosen_BN]
    size = chunk_tokens or max(1, LOGITS_AT_ONCE // vocab_size)
    chunks = list(zip(hidden_TD.split(size), targets_T.split(size)))  # an empty one where there is no target at all
    if weights_are_sharded(lm_head):
        (most,) = largest_of_ranks([len(chunks)], hidden_TD.device)
        chunks += [(hidden_TD[:0], targets_T[:0])] * (most - len(chunks))
    total = sum(checkpoint(_chunk_loss, lm_head, *chunk, use_reentrant=False) for chunk in chunks)
    if num_items_in_batch is None:
        return total / targets_T.numel() if targets_T.numel() else total / total.new_zeros(())
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def _chunk_loss(lm_head: nn.Module, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    logits_TV = lm_head(hidden_TD)
    logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum")
