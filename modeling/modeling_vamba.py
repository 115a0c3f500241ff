"""Vamba (arXiv 2503.11579): Qwen2-VL whose video tokens pass Mamba-2 blocks and are read by cross-attention.

What is unusual: an encoder-decoder whose decoder looks at every level of the encoder. The video stream never reads the
text (equations 3 and 4 of the paper), so a first phase fills a `VideoMemory` with keys and values per layer, chunk by
chunk in constant activation memory, and a second phase, the text decoder, reads it. There is no placeholder token per
video token; text positions count text only.

Shapes: B batch, M video tokens, N text tokens, S video tokens of one chunk, D hidden, H heads, P head dim.
"""

import contextlib
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import CompileConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    CausalLMOutputWithCrossAttentions,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLAttention,
    Qwen2VLRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vamba import VambaConfig, VambaTextConfig
from .cpu_offloading import offload_saved
from .cross_attention import VambaCrossAttention
from .decoder_layer import VambaDecoderLayer
from .frame_streaming import default_chunk_frames, load_ahead, normalized, to_device
from .generation_vamba import VambaGenerationMixin
from .graphed_decoding import GraphedDecoding
from .kernels_norm import FusedRMSNorm
from .media import (
    MediaItem,
    assign_media,
    chunk_patches,
    list_media,
    media_positions,
    split_frames,
    without_seen_grids,
)
from .ranks import agree_on_calls, weights_are_sharded
from .shared_model import VideoHeadMixin, VideoModelMixin, flattened_lengths
from .video_encoder import VambaPreTrainedModel, VambaVideoEncoder, makers_of_key_values
from .video_level import VideoLevel
from .video_memory import VideoMemory
from .vision_tower import VambaVisionTower, vision_tower


class VambaTextModel(VambaPreTrainedModel):
    """Qwen2-VL's language model with a cross-attention to the video memory in every layer."""

    config: VambaTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {
        "hidden_states": VambaDecoderLayer,
        "attentions": OutputRecorder(Qwen2VLAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(VambaCrossAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: VambaTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([VambaDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2VLRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: VideoMemory | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        packed: list[tuple[int, VideoMemory]] | None = None,
        read_besides: list[VideoMemory] = (),
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        packed (`list` of `(int, VideoMemory)`, *optional*):
            The samples that one row of text consists of: their lengths, and the memories of their videos.
        read_besides (`list` of `VideoMemory`, *optional*):
            Memories, perhaps without video, that are read for nothing, as other ranks read more than this one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        memory = VideoMemory.of(past_key_values, self.config)
        for _, checked in packed or [(0, memory)]:
            checked.check(self.config, inputs_embeds.shape[0], inputs_embeds.dtype)
        text_cache = memory if use_cache or memory.get_seq_length() else None
        borders = None  # positions that start anew with each sample, for the mask
        if packed:
            lengths = [length for length, _ in packed]
            borders = positions_in_samples(lengths, inputs_embeds.device)
            kwargs |= varlen_kwargs(lengths, inputs_embeds.device)
        elif position_ids is not None and is_tracing(inputs_embeds):  # which cannot look whether these do
            borders = position_ids[0] if position_ids.dim() == 3 else position_ids
        position_ids = text_position_ids(position_ids, attention_mask, inputs_embeds, memory.get_seq_length())
        if isinstance(attention_mask, dict):  # made by `generate` for a static cache
            causal_mask = attention_mask["full_attention"]
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=text_cache,
                position_ids=borders,
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        query_positions = position_embeddings if self.config.cross_attn_use_position_embeddings else None
        samples, video_mask_BM = packed or [(inputs_embeds.shape[1], memory)], memory.video_mask(inputs_embeds.device)
        hidden_states, read = inputs_embeds, [*(seen for _, seen in samples), *read_besides]
        for index, layer in enumerate(self.layers):
            device = layer.device_for(inputs_embeds)
            videos = [seen.level(index, device) if seen.video_length else None for seen in read]
            with _saving(read, videos):
                hidden_states = layer(
                    hidden_states,
                    *(t for video in videos for t in video or (None,) * len(VideoLevel._fields)),
                    video_mask_BM=video_mask_BM,
                    video_rows=memory.video_rows,
                    packed_lengths=[length for length, _ in samples] if packed else None,
                    attention_mask=causal_mask,
                    past_key_values=text_cache,
                    position_embeddings=position_embeddings,
                    query_position_embeddings=query_positions,
                    **kwargs,
                )
            del videos  # of deferred levels only autograd keeps them
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=text_cache
        )


def _saving(memories: list[VideoMemory], videos: list[VideoLevel | None]) -> contextlib.AbstractContextManager:
    """Within, autograd keeps keys and values where their deferred levels keep what they save, which may be the CPU."""
    moved = [t for memory, video in zip(memories, videos) if video and memory.offloads_saved for t in video[:2]]
    return offload_saved(*moved) if moved else contextlib.nullcontext()


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


@auto_docstring
class VambaModel(VideoModelMixin, VambaPreTrainedModel):
    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.visual = vision_tower(config.vision_config)
        self.video_encoder = VambaVideoEncoder._from_config(config)
        self.language_model = VambaTextModel._from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_grid_thw: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        video_grid_thw (`torch.LongTensor` of shape `(num_videos, 3)`):
            Temporal, height and width dimensions of each video in patches. `pooler_output` holds V_0 of each video,
            `(t * h * w / merge_size**2, hidden_size)`.
        """
        patches = normalized(pixel_values_videos, self.config).to(self.visual.dtype)
        output = self.visual(patches, grid_thw=video_grid_thw, **kwargs)
        merged = self.config.vision_config.spatial_merge_size**2
        tokens = [t * h * w // merged for t, h, w in video_grid_thw.tolist()]
        output.pooler_output = output.pooler_output.split(tokens)
        return output

    @can_return_tuple
    @auto_docstring
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        image_grid_thw: torch.LongTensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        image_grid_thw (`torch.LongTensor` of shape `(num_images, 3)`):
            Temporal (1), height and width dimensions of each image in patches.
        """
        return self.get_video_features(pixel_values, image_grid_thw, return_dict=True, **kwargs)

    def encode_video(
        self,
        pixel_values_videos: Tensor,
        video_grid_thw: torch.LongTensor,
        memory: VideoMemory | None = None,
        *,
        rows: list[int] | None = None,
        continue_video: bool | None = None,
        chunk_frames: int | None = None,
    ) -> VideoMemory:
        """Encodes video into a new `VideoMemory`, or appends it to one; any split of the frames gives the same result.

        Args:
            pixel_values_videos: patches as the video processor makes them, (sum of t * h * w, patch size); as uint8
                (`do_rescale=False, do_normalize=False`) they take a quarter of the memory and are normalised here.
                They may stay on the CPU: each chunk is copied while the one before is computed.
            video_grid_thw: (t, h, w) of each video in patches, (number of videos, 3).
            memory: what was seen before; it is extended in place and returned, unchanged if anything is raised. None
                starts anew.
            rows: for each video the row of the memory it belongs to; None puts all into row 0.
            continue_video: whether the first video continues the memory's last one, frame numbers included. None: it
                does if both have the same size. Matters only with `cross_attn_use_position_embeddings`.
            chunk_frames: frames that go through vision tower and encoder at once, which bounds the activations; None
                means 128, or fewer where the GPU's free memory asks for it, or all while gradients are recorded.
        """
        items = list_media("video", pixel_values_videos, video_grid_thw)
        rows = [0] * len(items) if rows is None else rows
        if len(rows) != len(items) or min(rows, default=0) < 0:
            raise ValueError(f"{rows=} for {len(items)} videos; give one row for each video, counted from 0.")
        memory = VideoMemory(self.config) if memory is None else memory
        by_row: list[list[MediaItem]] = [[] for _ in range(max([*rows, memory.num_video_rows - 1], default=0) + 1)]
        for item, row in zip(items, rows):
            previous = memory.media[row][-1] if row < len(memory.media) and memory.media[row] else None
            if not by_row[row] and previous is not None and previous[0] == "video" and continue_video is not False:
                if previous[2:] == [item.h, item.w]:
                    item = item._replace(first_frame=previous[1])
                elif continue_video:
                    raise ValueError(f"A video of {item.h} x {item.w} patches cannot continue one of {previous[2:]}.")
            by_row[row].append(item)
        self.encode_media([(memory, by_row)], {"video": pixel_values_videos}, chunk_frames)
        return memory

    def encode_media(
        self,
        videos: list[tuple[VideoMemory, list[list[MediaItem]]]],
        pixels: dict[str, Tensor],
        chunk_frames: int | None = None,
        read_once: bool = False,
        reads: int = 0,
    ) -> list[VideoMemory]:
        """The loop all media go through: frames -> vision tower -> Mamba-2 blocks and video memory, chunk by chunk.

        Args:
            videos: memories, extended in place, each with the media of its rows in order.
            pixels: the patches of all images and of all videos, by kind.
            chunk_frames: see `encode_video`. read_once: see `VambaVideoEncoder.forward`.
            reads: how many memories the text is going to read.

        Returns:
            memories to be read besides, for nothing: as many as other ranks read more than this one (see `ranks`).
        """
        frames = self._temporal_patches_at_once(videos, chunk_frames)
        merged = self.config.vision_config.spatial_merge_size**2
        for memory, rows in videos:
            if memory.num_video_rows not in (0, len(rows)):
                raise ValueError(f"The memory has {memory.num_video_rows} video rows, the media are for {len(rows)}.")
        device, read_once = self.visual.device, read_once and frames is None
        chunks = [(memory, chunk) for memory, rows in videos for chunk in split_frames(rows, frames)]
        passes = [self.count_passes(item for row in chunk for item in row) for _, chunk in chunks]
        passes, all_reads = agree_on_calls(self, passes, reads, device)
        loaded = load_ahead(
            chunks,
            lambda chunk: [
                part if frames is None else to_device(part, device) for part in chunk_patches(chunk[1], pixels)
            ],
            device,
        )
        with contextlib.ExitStack() as on_error:
            for memory, rows in videos:
                on_error.enter_context(memory.unchanged_on_error())
                self._rotate_video_keys(memory, True)  # as the new keys will be
                longest = max(sum(item.num_patches for item in row) // merged for row in rows)
                memory.reserve(max(memory.expected_length, memory.video_length + longest))
                memory.note_weights(self.check_weights(memory), self.config.vision_config.temporal_patch_size)
            for ((memory, chunk), patches), count in zip(loaded, passes):
                vision_BSD, lengths_B = self._vision_tokens(chunk, patches, count)
                self._encode(memory, chunk, vision_BSD, lengths_B, read_once)
                memory.note_media(chunk)
            idle = [VideoMemory(self.config) for _ in passes[len(chunks) :]]
            smallest = MediaItem("video", 1, self.smallest_side, self.smallest_side, 0)
            for memory, count in zip(idle, passes[len(chunks) :]):
                vision_BSD = self.black_passes(count).repeat(1, 1, self.config.text_config.hidden_size)
                self._encode(memory, [[smallest]], vision_BSD, None, read_once)
        return (idle + [VideoMemory(self.config)] * all_reads)[: all_reads - reads]

    def _temporal_patches_at_once(self, videos, chunk_frames: int | None) -> int | None:
        """How many temporal patches of each row go through the model at once; None for all."""
        if chunk_frames is None and videos and not torch.is_grad_enabled():
            rows = [[item.h * item.w for item in row] for _, rows in videos for row in rows]
            chunk_frames = default_chunk_frames(self, sum(max(row, default=0) for row in rows))
        return None if chunk_frames is None else max(1, chunk_frames // self.config.vision_config.temporal_patch_size)

    def _encode(self, memory, chunk, vision_BSD: Tensor, lengths_B: Tensor | None, read_once: bool) -> None:
        positions = None
        if self.config.text_config.cross_attn_use_position_embeddings:
            positions_3BS = media_positions(chunk, self.config.vision_config.spatial_merge_size)
            positions = self.language_model.rotary_emb(vision_BSD, positions_3BS.to(vision_BSD.device))
        self.video_encoder(
            vision_BSD,
            video_memory=memory,
            key_values=makers_of_key_values(self.language_model.layers),
            lengths_B=lengths_B,
            position_embeddings=positions,
            read_once=read_once,
        )

    def modules_that_make_memories(self) -> list[nn.Module]:
        """Those whose weights a video's keys, values and states depend on."""
        layers = self.language_model.layers
        norms = [layer.input_layernorm for layer in layers if layer.norm_video]
        projections = [proj for layer in layers for proj in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)]
        return [self.visual, self.video_encoder, *norms, *projections]

    def _vision_tokens(
        self, chunk: list[list[MediaItem]], parts: list[Tensor], passes: int
    ) -> tuple[Tensor, Tensor | None]:
        """V_0 of one chunk, rows padded on the right, (B, S, D), and the rows' lengths if they differ.

        Args:
            parts: the patches of its items in order, wherever they are cut. passes: see `tower_tokens`.
        """
        tokens, zero = self.tower_tokens([item for row in chunk for item in row], parts, passes)
        if zero is not None:
            tokens[0] = tokens[0] + zero
        merged = self.config.vision_config.spatial_merge_size**2
        lengths = [sum(item.num_patches for item in row) // merged for row in chunk]
        lengths_B = torch.tensor(lengths, device=tokens[0].device) if len(set(lengths)) > 1 else None
        return nn.utils.rnn.pad_sequence(torch.cat(tokens).split(lengths), batch_first=True), lengths_B

    def _tower_pass(self, patches: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.visual, VambaVisionTower):  # ours would have to wait for the GPU to read it there
            grid_thw = to_device(grid_thw, self.visual.device)
        patches = to_device(patches, self.visual.device)
        return self.get_video_features(patches, grid_thw, return_dict=True).pooler_output

    @property
    def smallest_side(self) -> int:
        """Patches along each side of the smallest frame that the tower takes."""
        return self.config.vision_config.spatial_merge_size

    def _rotate_video_keys(self, memory: VideoMemory, rotated: bool) -> None:
        """Puts M-RoPE on a memory's keys or takes it off, once."""
        if not self.config.text_config.cross_attn_use_position_embeddings or memory.keys_are(rotated):
            return
        positions_3BM = media_positions(memory.video_items(), self.config.vision_config.spatial_merge_size)
        if (mask_BM := memory.video_mask()) is not None:  # padding may stand between the chunks of a row
            valid = torch.arange(positions_3BM.shape[2]) < torch.tensor(memory.num_video_tokens).unsqueeze(1)
            spread = positions_3BM.new_zeros(3, *mask_BM.shape)
            spread[:, mask_BM.cpu()] = positions_3BM[:, valid]
            positions_3BM = spread

        def rotate(keys: Tensor) -> Tensor:
            cos, sin = self.language_model.rotary_emb(keys[..., :0], positions_3BM.to(keys.device))
            cos, sin = cos.to(keys.device), sin.to(keys.device)  # accelerate may compute them on another GPU
            return apply_rotary_pos_emb(keys, keys, cos, sin if rotated else -sin)[0]

        memory.rotate_keys(rotated, rotate)

    def media_rows(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mm_token_type_ids: Tensor | None,
        pixels: dict[str, Tensor | None],
        grids: dict[str, Tensor | None],
    ) -> list[list[MediaItem]]:
        """Which media belong to which row of text, in order: the n-th item to the n-th `<|vision_start|>`.

        `pixels` and `grids` hold patches and `grid_thw` of all images and of all videos, by kind.
        """
        images, videos = (list_media(kind, pixels[kind], grids[kind]) for kind in ("image", "video"))
        return assign_media(images, videos, self.media_starts(input_ids, inputs_embeds), mm_token_type_ids)

    def media_of_samples(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        mm_token_type_ids: Tensor | None,
        pixels: dict[str, Tensor | None],
        grids: dict[str, Tensor | None],
        lengths: list[int],
    ) -> list[list[MediaItem]]:
        """Which media belong to which of the samples packed into one row of text. Arguments as of `media_rows`.

        Raises:
            ValueError: more than one row, or lengths that do not add up to it.
        """
        B, N, _ = inputs_embeds.shape
        if B != 1 or sum(lengths) != N or min(lengths) < 1:
            raise ValueError(f"packed_lengths={lengths} must be positive and add up to one row of text, not {B} x {N}.")

        def by_sample(t_1N: Tensor) -> Tensor:
            return nn.utils.rnn.pad_sequence(t_1N[0].split(lengths), batch_first=True)

        images, videos = (list_media(kind, pixels[kind], grids[kind]) for kind in ("image", "video"))
        types = None if mm_token_type_ids is None else by_sample(mm_token_type_ids)
        return assign_media(images, videos, by_sample(self.media_starts(input_ids, inputs_embeds)), types)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        packed_lengths: list[int] | torch.LongTensor | None = None,
        unrotate_video_keys: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPastAndCrossAttentions:
        r"""
        mm_token_type_ids (`torch.IntTensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 at the `<|vision_start|>` of an image, 2 at that of a video; needed where a batch mixes the two.
        packed_lengths (`list[int]` or `torch.LongTensor` of shape `(number of samples,)`, *optional*):
            One row of text consists of samples of these lengths, which see neither each other nor each other's media.
            If not given they are told by `cu_seq_lens_q` or by `position_ids` that start anew within the row.
        unrotate_video_keys (`bool`, *optional*, defaults to `False`):
            Read the video without positions although `cross_attn_use_position_embeddings` is set; see
            `VambaForConditionalGeneration.prepare_inputs_for_generation`.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        memory, packed = VideoMemory.of(past_key_values, self.config.text_config), None
        videos: list[tuple[VideoMemory, list[list[MediaItem]]]] = []
        pixels = {"image": pixel_values, "video": pixel_values_videos}
        grids = without_seen_grids(pixels, {"image": image_grid_thw, "video": video_grid_thw}, memory.media)
        if packed_lengths is None:
            packed_lengths = flattened_lengths(position_ids, attention_mask, kwargs.get("cu_seq_lens_q"))
        if packed_lengths is not None:
            if past_key_values is not None:
                raise ValueError("Samples packed into one row go without a cache: pass no past_key_values.")
            lengths = torch.as_tensor(packed_lengths).tolist()
            rows = self.media_of_samples(input_ids, inputs_embeds, mm_token_type_ids, pixels, grids, lengths)
            packed = [(length, VideoMemory(self.config)) for length in lengths]
            videos = [(sample, [row]) for (_, sample), row in zip(packed, rows) if row]
            if position_ids is None:
                position_ids = positions_in_samples(lengths, inputs_embeds.device)
            attention_mask = None  # there is no padding within
        elif any(given is not None for given in (*pixels.values(), *grids.values())):
            rows = self.media_rows(input_ids, inputs_embeds, mm_token_type_ids, pixels, grids)
            videos = [(memory, rows)] if any(rows) else []
        B, N, _ = inputs_embeds.shape
        if not videos and N > 1 and memory.video_length:  # not for each token that is decoded
            memory.check(self.config.text_config, B, inputs_embeds.dtype)
            self.check_weights(memory)
        read_besides: list[VideoMemory] = []
        if videos or self.shares_calls(N):
            reads = max(len(videos), min(1, memory.video_length))
            read_once = packed is not None or (past_key_values is None and not use_cache)
            read_besides = self.encode_media(videos, pixels, read_once=read_once, reads=reads)
        if packed or (torch.is_grad_enabled() and weights_are_sharded(self)):  # ranks may differ in this
            for read in [memory, *(sample for _, sample in packed or ()), *read_besides]:
                read.keep_no_cell()
        memory.expand_rows(B)
        self.warn_of_unseen_media(input_ids, *([memory] if packed is None else (sample for _, sample in packed)))
        self._rotate_video_keys(memory, not unrotate_video_keys)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=memory,
            use_cache=False if packed is not None or memory.is_read_once else use_cache,
            packed=packed,
            read_besides=read_besides,
            **kwargs,
        )


@auto_docstring
class VambaForConditionalGeneration(VideoHeadMixin, VambaPreTrainedModel, VambaGenerationMixin, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VambaConfig):
        super().__init__(config)
        self.model = VambaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """The step that `generate` decodes with for a static cache: a CUDA graph, or, if asked, `torch.compile`'s."""
        if compile_config is None and GraphedDecoding.suits(self):
            return GraphedDecoding(self.__call__)
        return super().get_compiled_call(compile_config)

    @torch.no_grad()
    def encode_video(self, *args, **kwargs) -> VideoMemory:
        """`VambaModel.encode_video` without gradients."""
        return self.model.encode_video(*args, **kwargs)

    @can_return_tuple
    @auto_docstring
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
    ) -> tuple | CausalLMOutputWithCrossAttentions:
        r"""
        mm_token_type_ids (`torch.IntTensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 at the `<|vision_start|>` of an image, 2 at that of a video; needed where a batch mixes the two.
        packed_lengths (`list[int]` or `torch.LongTensor` of shape `(number of samples,)`, *optional*):
            One row of text consists of samples of these lengths, which see neither each other nor each other's media;
            the first label of each should be -100. Loss and gradients are those of the samples in a batch.
        skip_logits (`bool`, *optional*, defaults to `False`):
            With `labels`: compute the loss in chunks of positions, whose logits are never all held, and return none.

        Example:

        ```python
        >>> import vamba
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor

        >>> model = AutoModelForImageTextToText.from_pretrained("path/to/vamba")
        >>> processor = AutoProcessor.from_pretrained("path/to/vamba")
        >>> messages = [{"role": "user", "content": [
        ...     {"type": "video", "video": "talk.mp4", "fps": 1.0}, {"type": "text", "text": "Who speaks third?"}]}]
        >>> inputs = processor.apply_chat_template(
        ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        >>> answer = model.generate(**inputs, max_new_tokens=64)
        >>> processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```
        """
        outputs: BaseModelOutputWithPastAndCrossAttentions = self.model(
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
        return CausalLMOutputWithCrossAttentions(
            **self._logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, skip_logits, **kwargs),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


VambaModel.register_for_auto_class("AutoModel")
VambaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "VambaForConditionalGeneration",
    "VambaModel",
    "VambaPreTrainedModel",
    "VambaTextModel",
    "VambaVideoEncoder",
]
