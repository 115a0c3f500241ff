"""Video-Ma2mba (arXiv 2411.19460): a Mamba-2 language model over one causal stream of text and video tokens.

What is unusual: there is no attention but the vision tower's, and no cache but one state per layer (`StateMemory`), so
cost per token and memory do not depend on what came before. Text and media go through one loop, chunk by chunk; outputs
stand for the text only. Padding, on either side, never enters the stream.

Shapes: B batch, N text tokens, S tokens of one chunk of the stream, F frames, D hidden.
"""

from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_video_ma2mba import VideoMa2mbaConfig, VideoMa2mbaTextConfig
from .generation import VideoMa2mbaGenerationMixin
from .mamba2 import Mamba2Block, Mamba2Mixer, Mamba2State, init_mamba2_mixer
from .media import (
    MediaItem,
    Run,
    default_chunk_frames,
    flattened_lengths,
    item_starts,
    list_media,
    media_of_rows,
    normalized,
    runs_of,
    split_runs,
    text_outputs,
    to_device,
    without_seen_grids,
)
from .multi_axis import MultiAxisCheckpointingMixin, MultiAxisSettings, mamba2_costs, run_cells
from .state_memory import StateMemory
from .video_model import VideoHeadMixin, VideoModelMixin
from .vision_tower import ProjectorLinear, VideoMa2mbaProjector, clip_tower, frames_of


class VideoMa2mbaBlock(Mamba2Block):
    """`Mamba2Block` on a residual stream that may be wider than the weights, as transformers' Mamba-2 has it.

    It is the block that widens it, so that what enters the first one, and is kept for backward, is still narrow.
    """

    def forward(
        self, hidden_BSD: Tensor, state: Mamba2State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        return super().forward(hidden_BSD.to(residual_dtype(self.mixer.config, hidden_BSD.dtype)), state, lengths_B)


def residual_dtype(config: VideoMa2mbaTextConfig, dtype: torch.dtype) -> torch.dtype:
    """Of the stream between blocks, for embeddings of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if config.residual_in_fp32 else dtype


@auto_docstring
class VideoMa2mbaPreTrainedModel(MultiAxisCheckpointingMixin, PreTrainedModel):
    config: VideoMa2mbaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoMa2mbaBlock", "CLIPVisionEmbeddings", "CLIPEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["mixer.A_log", "mixer.D", "mixer.dt_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Mamba2Mixer):
            init_mamba2_mixer(module, self.config.get_text_config().num_hidden_layers)
        elif isinstance(module, ProjectorLinear):  # not its parent, which transformers passes over without weights
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class VideoMa2mbaTextModel(VideoMa2mbaPreTrainedModel):
    """The Mamba-2 blocks over a stream of tokens, whatever they stand for."""

    config: VideoMa2mbaTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": VideoMa2mbaBlock}
    multi_axis_checkpointing: MultiAxisSettings | None = None

    def __init__(self, config: VideoMa2mbaTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([VideoMa2mbaBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = Qwen2VLRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        inputs_embeds: torch.FloatTensor,
        past_key_values: StateMemory,
        lengths_B: torch.LongTensor | None = None,
        read_at: tuple[Tensor, Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        past_key_values (`StateMemory`):
            The states before the first token; those after each row's last take their place.
        lengths_B (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Valid tokens of each row, the rest being padding on the right; all are if not given.
        read_at (`tuple` of two `torch.LongTensor` of shape `(n,)`, *optional*):
            Rows and places of the tokens whose outputs are wanted, `(n, hidden_size)`; all are if not given.
        """
        hidden_BSD, states = inputs_embeds, list(past_key_values.states)
        if self.runs_cells:
            hidden_BSD = self._run_cells(hidden_BSD, states, lengths_B, read_at)
        else:
            for index, block in enumerate(self.layers):
                hidden_BSD, states[index] = block(hidden_BSD, states[index], lengths_B)
            if read_at is not None:
                hidden_BSD = hidden_BSD[tuple(index.to(hidden_BSD.device) for index in read_at)]
        hidden_BSD = self.norm(hidden_BSD).to(inputs_embeds.dtype)
        past_key_values.states[:] = states  # all or, if anything was raised, none
        return BaseModelOutputWithPast(last_hidden_state=hidden_BSD, past_key_values=past_key_values)

    @property
    def runs_cells(self) -> bool:
        return self.multi_axis_checkpointing is not None and self.training and torch.is_grad_enabled()

    def _run_cells(
        self,
        hidden_BSD: Tensor,
        states: list[Mamba2State | None],
        lengths_B: Tensor | None,
        read_at: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        settings = self.multi_axis_checkpointing
        residual = residual_dtype(self.config, hidden_BSD.dtype)
        costs = mamba2_costs(self.config, self.norm.weight.dtype, residual_dtype=residual)
        layers, sizes = settings.intervals(costs, len(self.layers), hidden_BSD, self)
        hidden_BSD, states[:] = run_cells(
            self.layers,
            hidden_BSD,
            states,
            lengths_B,
            read_at,
            layer_interval=layers,
            sequence_interval=sizes,
            offload=settings.offload,
        )
        return hidden_BSD


@auto_docstring
class VideoMa2mbaModel(VideoModelMixin, VideoMa2mbaPreTrainedModel):
    def __init__(self, config: VideoMa2mbaConfig):
        super().__init__(config)
        self.visual = clip_tower(config.vision_config)
        self.projector = VideoMa2mbaProjector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = VideoMa2mbaTextModel._from_config(config.text_config)
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
            Frames, and height and width in patches, of each video. `pooler_output` holds the tokens of each video,
            `(frames * tokens_per_frame, hidden_size)`; `last_hidden_state` the tower's penultimate patches, row by row,
            `(sum of t * h * w, vision width)`.
        """
        grid, sizes = self.config.grid_size, video_grid_thw.tolist()
        for _, h, w in sizes:
            if (h, w) != (grid, grid):
                raise ValueError(
                    f"A frame has {h} x {w} patches and the vision tower takes {grid} x {grid}: frames must be "
                    f"{self.config.vision_config.image_size} pixels high and wide, as VideoMa2mbaProcessor makes them."
                )
        frames = frames_of(normalized(pixel_values_videos, self.config), grid, self.config.vision_config.patch_size)
        output = self.visual(frames.to(self.visual.dtype), **kwargs)
        patches_FPD = output.last_hidden_state[:, 1:]  # without the class token
        output.last_hidden_state = patches_FPD.flatten(0, 1)
        output.pooler_output = (
            self.projector(patches_FPD).flatten(0, 1).split([t * self.config.tokens_per_frame for t, _, _ in sizes])
        )
        return output

    def _encode_videos(self, memory, videos, pixels, continue_video, chunk_frames) -> StateMemory:
        """See `encode_video`: the memory reads a `<|vision_start|>` before each video, `<|vision_end|>` between two."""
        memory = StateMemory.of(memory, self.config)
        B = max([*(row for _, row in videos), memory.batch_size - 1], default=0) + 1
        by_row, marks = self._open_videos(memory, videos, B, continue_video)
        ids_BN = nn.utils.rnn.pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in marks], batch_first=True)
        lengths = torch.tensor([len(ids) for ids in marks])
        unread_BN = torch.arange(ids_BN.shape[1]) < lengths.unsqueeze(1)
        runs = runs_of(unread_BN, self.media_starts(ids_BN, None), by_row)
        memory.check(self.config.text_config, B)
        embed = self.get_input_embeddings()
        inputs_embeds = embed(to_device(ids_BN, embed.weight.device))
        self.read(memory, inputs_embeds, runs, pixels, chunk_frames)
        fewest, most = int(lengths.min()), int(lengths.max())
        memory.note_text(lengths.to(inputs_embeds.device), fewest, is_ragged=memory.is_ragged or fewest < most)
        return memory

    def _open_videos(
        self, memory: StateMemory, videos: list[tuple[MediaItem, int]], B: int, continue_video: bool | None
    ) -> tuple[list[list[MediaItem]], list[list[int]]]:
        """The videos of each row, the first perhaps continuing what the memory saw, and the text that opens them."""
        by_row: list[list[MediaItem]] = [[] for _ in range(B)]
        marks: list[list[int]] = [[] for _ in range(B)]
        for item, row in videos:
            last = memory.last_open(row)
            if not by_row[row] and continue_video is not False and last is not None and last[0] == "video":
                item = item._replace(first_frame=last[1])
            elif not by_row[row] and continue_video and memory.batch_size > row:
                raise ValueError("There is no video to continue: what the memory has read last is no video.")
            else:
                marks[row] += [self.config.vision_end_token_id] if by_row[row] or last else []
                marks[row].append(self.config.vision_start_token_id)
            by_row[row].append(item)
        return by_row, marks

    def modules_that_make_memories(self) -> list[nn.Module]:
        """Those whose weights a memory's states depend on."""
        text = self.language_model
        return [self.visual, self.projector, text.embed_tokens, *text.layers]

    def read(
        self,
        memory: StateMemory,
        inputs_embeds: Tensor,
        streams: list[list[Run]],
        pixels: dict[str, Tensor],
        chunk_frames: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """The loop everything goes through: text and frames -> tokens -> Mamba-2 blocks, chunk by chunk.

        Args:
            memory: extended in place. inputs_embeds: the text, (B, N, D). streams: see `runs_of`.
            pixels: the patches of all images and of all videos, by kind. chunk_frames: see `encode_video`.

        Returns:
            the outputs for the text, (B, N, D), zero for what is in no stream.
        """
        per_frame = self.config.tokens_per_frame
        if chunk_frames is None and not torch.is_grad_enabled():
            chunk_frames = default_chunk_frames(self, len(streams) * self.config.grid_size**2)
        tokens = None if chunk_frames is None else max(1, chunk_frames) * per_frame

        wanted = kwargs.setdefault("output_hidden_states", False)  # whatever the language model's configuration says
        levels: list[Tensor | None] = []
        chunks = list(split_runs(streams, tokens, per_frame))
        items = [[run.item for stream in chunk for run in stream if run.item] for chunk in chunks]
        with memory.unchanged_on_error():
            memory.note_weights(self.check_weights(memory))
            media = self.media_tokens(items, pixels, whole=tokens is None)
            for chunk, (media_tokens, zero) in zip_longest(chunks, media):
                if chunk is None:  # only another rank has so many chunks
                    nothing = inputs_embeds.new_zeros(1, 1, inputs_embeds.shape[-1])
                    self.language_model(inputs_embeds=nothing, past_key_values=StateMemory(self.config), **kwargs)
                    continue
                stream_BSD, lengths_B = self._stream_tokens(chunk, inputs_embeds, media_tokens, zero)
                rows, places, positions = text_outputs(chunk, per_frame)
                read_at = (rows, places) if wanted is False else None
                output = self.language_model(
                    inputs_embeds=stream_BSD, past_key_values=memory, lengths_B=lengths_B, read_at=read_at, **kwargs
                )
                new_levels = [output.last_hidden_state, *(output.hidden_states or ())]
                levels = levels or [None if new is None else new.new_zeros(inputs_embeds.shape) for new in new_levels]
                for level, new in zip(levels, new_levels):
                    if new is not None:  # a level that was not asked for
                        row, place, position = (index.to(new.device) for index in (rows, places, positions))
                        level[row, position] = new[row, place] if read_at is None else new
                memory.note_chunk(chunk)
        last, *hidden_states = levels or [inputs_embeds.new_zeros(inputs_embeds.shape)]
        return BaseModelOutputWithPast(last_hidden_state=last, hidden_states=tuple(hidden_states) or None)

    def _stream_tokens(
        self, chunk: list[list[Run]], inputs_embeds: Tensor, media_tokens: list[Tensor], zero: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens of one chunk, rows padded on the right, (B, S, D), and the rows' lengths if they differ.

        `media_tokens` are those of its media in order, wherever they are cut, and `zero` is to be added somewhere.
        """
        media = iter(media_tokens)
        by_row = []
        for text_ND, stream in zip(inputs_embeds, chunk):
            parts = [text_ND[:0]]
            for run in stream:
                if run.item is None:
                    parts.append(text_ND[run.positions.to(text_ND.device)])
                else:
                    left = run.item.t * self.config.tokens_per_frame
                    while left:
                        parts.append(next(media).to(text_ND))
                        left -= len(parts[-1])
            by_row.append(torch.cat(parts))
        media_tokens.clear()  # whoever holds the list would otherwise keep them while the layers are computed
        if zero is not None:
            by_row[0] = by_row[0] + zero.to(by_row[0])
        lengths = [len(row) for row in by_row]
        lengths_B = torch.tensor(lengths, device=inputs_embeds.device) if len(set(lengths)) > 1 else None
        return nn.utils.rnn.pad_sequence(by_row, batch_first=True), lengths_B

    def _tower_pass(self, patches: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Where the tower trains and gradients are checkpointed, patches are all that is kept for backward."""

        def tokens(patches: Tensor) -> tuple[Tensor, ...]:
            patches = to_device(patches, self.visual.device)
            return self.get_video_features(patches, grid_thw, return_dict=True).pooler_output

        checkpointed = self.language_model.gradient_checkpointing or self.language_model.multi_axis_checkpointing
        if checkpointed and self.training and torch.is_grad_enabled() and self.tower_trains:
            return checkpoint(tokens, patches, use_reentrant=False)
        return tokens(patches)

    @property
    def smallest_side(self) -> int:
        """Patches along each side of a frame."""
        return self.config.grid_size

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        packed_lengths: list[int] | None = None,
        video_times: Tensor | None = None,
        read_hidden_states: tuple[Tensor, ...] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPast:
        r"""
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 at padding, on either side, for the tokens given or for all text since the memory's first.
        mm_token_type_ids (`torch.IntTensor` of shape `(batch_size, sequence_length)`, *optional*):
            1 at the `<|vision_start|>` of an image, 2 at that of a video; needed where a batch mixes the two.
        position_ids (`torch.LongTensor`, *optional*):
            Not read, as a state knows of no positions; ValueError if they say that a row consists of several samples.
        packed_lengths (`list[int]`, *optional*):
            Of no more than one sample: ValueError otherwise.
        video_times (`torch.Tensor` of shape `(sum of t, 2)`, *optional*):
            Start and end of each temporal patch of the videos in seconds, which the memory keeps.
        read_hidden_states (`tuple` of `torch.FloatTensor`, *optional*):
            Those of the part of a prompt that `generate` has read before; they are put in front.
        """
        inputs_embeds = self.embedded(input_ids, inputs_embeds, attention_mask)
        if kwargs.get("output_hidden_states") is None:
            configs = (self.config, self.config.text_config)
            kwargs["output_hidden_states"] = any(config.output_hidden_states for config in configs)
        B, N = inputs_embeds.shape[:2]
        if packed_lengths is None:
            packed_lengths = flattened_lengths(position_ids, attention_mask, kwargs.get("cu_seq_lens_q"))
        if packed_lengths is not None and len(packed_lengths) > 1:
            raise ValueError(
                f"One row of text consists of {len(packed_lengths)} samples, and this model's states would carry each "
                "over to the next: give every sample a row of its own, padded, with an attention_mask."
            )
        memory = StateMemory.of(past_key_values, self.config)
        unread_BN = memory.unread(attention_mask, inputs_embeds)
        memory.expand_rows(B)
        memory.check(self.config.text_config, B)
        pixels = {"image": pixel_values, "video": pixel_values_videos}
        grids = without_seen_grids(pixels, {"image": image_grid_thw, "video": video_grid_thw}, memory.media)
        times = {"image": None, "video": video_times}
        items = [list_media(kind, pixels[kind], grids[kind], times[kind]) for kind in pixels]
        if not any(items):
            self.warn_of_unseen_media(input_ids, memory)
        at_once = torch.is_grad_enabled() or N <= self.pass_frames * self.config.tokens_per_frame
        plain = not any(items) and at_once and not self.shares_calls(N)
        if plain and (N == 1 or unread_BN is None):  # decoding asks nothing of the device
            if N > 1 and memory.made_by is not None:  # not for each token that is decoded
                self.check_weights(memory)
            lengths_B = None if unread_BN is None else unread_BN.sum(1)
            output = self.language_model(
                inputs_embeds=inputs_embeds, past_key_values=memory, lengths_B=lengths_B, **kwargs
            )
            memory.is_open = [False] * B
        else:
            starts_BN = self.media_starts(input_ids, inputs_embeds)
            unread_BN = torch.ones_like(starts_BN) if unread_BN is None else unread_BN
            starts_BN = item_starts(starts_BN & unread_BN, mm_token_type_ids, sum(map(len, items)))
            rows = media_of_rows(*items, starts_BN, mm_token_type_ids)
            output = self.read(memory, inputs_embeds, runs_of(unread_BN, starts_BN, rows), pixels, **kwargs)
            lengths_B = unread_BN.sum(1)
        memory.note_text(torch.full((B,), N, device=inputs_embeds.device) if lengths_B is None else lengths_B, N)
        hidden_states = output.hidden_states
        if read_hidden_states is not None and hidden_states is not None:
            copies = B // len(read_hidden_states[0])  # for beams or samples
            pairs = zip(read_hidden_states, hidden_states)
            hidden_states = tuple(torch.cat([old.repeat_interleave(copies, 0), new], 1) for old, new in pairs)
        return BaseModelOutputWithPast(
            last_hidden_state=output.last_hidden_state,
            past_key_values=None if use_cache is False else memory,
            hidden_states=hidden_states,
        )


class VideoMa2mbaForConditionalGeneration(VideoHeadMixin, VideoMa2mbaGenerationMixin, VideoMa2mbaPreTrainedModel):
    """Video-Ma2mba with a language model head; `forward` is `VideoHeadMixin`'s, `generate` GenerationMixin's."""

    _model_class, _output_class = VideoMa2mbaModel, CausalLMOutputWithPast


VideoMa2mbaModel.register_for_auto_class("AutoModel")
VideoMa2mbaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "VideoMa2mbaForConditionalGeneration",
    "VideoMa2mbaModel",
    "VideoMa2mbaPreTrainedModel",
    "VideoMa2mbaTextModel",
]
