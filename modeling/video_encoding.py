"""Video into a `VideoMemory`: which frames go together, through vision tower and encoder, chunk by chunk.

What is unusual: there is one loop for everything (`encode_media`): images and videos, one call or many, inference and
training. Any split of the frames gives the same memory, and an error leaves it as it was.

Shapes: B rows of video, M video tokens, S tokens of one chunk, D hidden, P head dim.
"""

import contextlib
from collections.abc import Callable
from itertools import zip_longest

import torch
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

from .media import (
    MediaItem,
    assign_media,
    default_chunk_frames,
    list_media,
    media_positions,
    split_frames,
    to_device,
)
from .video_memory import VideoMemory
from .vision_tower import VambaVisionTower


class VideoEncodingMixin:
    """For `VambaModel`: its `visual` tower and `video_encoder` extend memories."""

    def _encode_videos(self, memory, videos, pixels, continue_video, chunk_frames) -> VideoMemory:
        """See `encode_video`."""
        memory = VideoMemory(self.config) if memory is None else memory
        by_row: list[list[MediaItem]] = [[] for _ in range(memory.num_video_rows)]
        for item, row in videos:
            by_row += [[] for _ in range(row + 1 - len(by_row))]
            previous = memory.media[row][-1] if row < len(memory.media) and memory.media[row] else None
            if not by_row[row] and previous is not None and previous[0] == "video" and continue_video is not False:
                if previous[2:] == [item.h, item.w]:
                    item = item._replace(first_frame=previous[1])
                elif continue_video:
                    raise ValueError(f"A video of {item.h} x {item.w} patches cannot continue one of {previous[2:]}.")
            by_row[row].append(item)
        self.encode_media([(memory, by_row)], pixels, chunk_frames)
        return memory

    def encode_media(
        self,
        videos: list[tuple[VideoMemory, list[list[MediaItem]]]],
        pixels: dict[str, Tensor],
        chunk_frames: int | None = None,
        read_once: bool = False,
    ) -> list[VideoMemory]:
        """The loop all media go through: frames -> vision tower -> Mamba-2 blocks and video memory, chunk by chunk.

        Args:
            videos: memories, extended in place, each with the media of its rows in order.
            pixels: the patches of all images and of all videos, by kind.
            chunk_frames: see `encode_video`. read_once: see `VambaVideoEncoder.forward`.

        Returns:
            what the text reads of each video; then what it reads for nothing, as other ranks have more chunks.
        """
        frames = self._temporal_patches_at_once(videos, chunk_frames)
        for memory, rows in videos:
            if memory.num_video_rows not in (0, len(rows)):
                raise ValueError(f"The memory has {memory.num_video_rows} video rows, the media are for {len(rows)}.")
        chunks = [(memory, chunk) for memory, rows in videos for chunk in split_frames(rows, frames)]
        items = [[item for row in chunk for item in row] for _, chunk in chunks]
        sources: dict[int, VideoMemory] = {}
        with contextlib.ExitStack() as on_error:
            for memory, rows in videos:
                on_error.enter_context(memory.unchanged_on_error())
                self._rotate_video_keys(memory, True)  # as the new keys will be
                longest = max(sum(item.num_patches for item in row) // self.merged for row in rows)
                memory.reserve(max(memory.expected_length, memory.video_length + longest))
                memory.note_weights(self.check_weights(memory), self.config.vision_config.temporal_patch_size)
            tokens = self.media_tokens(items, pixels, whole=frames is None)
            for (memory, chunk), (parts, zero) in zip_longest(chunks, tokens, fillvalue=(None, None)):
                if chunk is None:  # only another rank has so many chunks
                    memory, chunk = VideoMemory(self.config), [[MediaItem("video", 1, *[self.smallest_side] * 2, 0)]]
                    parts = [zero.repeat(1, self.config.text_config.hidden_size)]
                elif zero is not None:
                    parts[0] = parts[0] + zero
                sources[id(memory)] = self._encode(memory, chunk, parts, read_once and frames is None)
                memory.note_media(chunk)
        return list(sources.values())

    def _temporal_patches_at_once(self, videos, chunk_frames: int | None) -> int | None:
        """How many temporal patches of each row go through the model at once; None for all."""
        if chunk_frames is None and videos and not torch.is_grad_enabled():
            rows = [[item.h * item.w for item in row] for _, rows in videos for row in rows]
            chunk_frames = default_chunk_frames(self, sum(max(row, default=0) for row in rows))
        return None if chunk_frames is None else max(1, chunk_frames // self.config.vision_config.temporal_patch_size)

    def _encode(
        self, memory: VideoMemory, chunk: list[list[MediaItem]], tokens: list[Tensor], read_once: bool
    ) -> VideoMemory:
        """Extends the memory by one chunk; `tokens` (S, D) are those of its items in order, wherever they are cut."""
        lengths = [sum(item.num_patches for item in row) // self.merged for row in chunk]
        vision_BSD = nn.utils.rnn.pad_sequence(torch.cat(tokens).split(lengths), batch_first=True)
        tokens.clear()  # whoever holds the list would otherwise keep them while the levels are computed
        positions = None
        if self.config.text_config.cross_attn_use_position_embeddings:
            positions_3BS = media_positions(chunk, self.config.vision_config.spatial_merge_size)
            positions = self.language_model.rotary_emb(vision_BSD, positions_3BS.to(vision_BSD.device))
        return self.video_encoder(
            vision_BSD,
            video_memory=memory,
            lengths_B=torch.tensor(lengths, device=vision_BSD.device) if len(set(lengths)) > 1 else None,
            position_embeddings=positions,
            norms=self._level_norms(),
            read_once=read_once,
        )

    def _level_norms(self) -> list[Callable[[Tensor], Tensor]] | None:
        """The text layers' norms, where `cross_attn_use_layer_norm` ties the levels' to them."""
        if not self.config.text_config.cross_attn_use_layer_norm:
            return None
        layers = self.language_model.layers
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

            for layer in layers:  # FSDP2 gathers a layer's weights when it is called; this is another way to call it
                if isinstance(layer, FSDPModule) and "norm_level" not in vars(layer):
                    register_fsdp_forward_method(layer, "norm_level")
        return [layer.norm_level for layer in layers]

    def modules_that_make_memories(self) -> list[nn.Module]:
        """Those whose weights a video's keys, values and states depend on."""
        tied = self.config.text_config.cross_attn_use_layer_norm
        norms = [layer.input_layernorm for layer in self.language_model.layers] if tied else []
        return [self.visual, self.video_encoder, *norms]

    def _tower_pass(self, patches: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.visual, VambaVisionTower):  # ours would have to wait for the GPU to read it there
            grid_thw = to_device(grid_thw, self.visual.device)
        patches = to_device(patches, self.visual.device)
        return self.get_video_features(patches, grid_thw, return_dict=True).pooler_output

    @property
    def merged(self) -> int:
        """Patches that the tower merges into one token."""
        return self.config.vision_config.spatial_merge_size**2

    @property
    def smallest_side(self) -> int:
        """Patches along each side of the smallest frame that the tower takes."""
        return self.config.vision_config.spatial_merge_size

    def _rotate_video_keys(self, memory: VideoMemory, rotated: bool) -> None:
        """Puts M-RoPE on a memory's keys or takes it off, once."""
        if not self.config.text_config.cross_attn_use_position_embeddings or memory.keys_are(rotated):
            return
        items = [[MediaItem(*item, start=0) for item in row] for row in memory.media]
        positions_3BM = media_positions(items, self.config.vision_config.spatial_merge_size)
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
        packed_lengths: list[int] | None = None,
        video_times: Tensor | None = None,
    ) -> list[list[MediaItem]]:
        """Which media belong to which row of text, or sample packed into one, in order.

        `pixels` and `grids` hold patches and `grid_thw` of all images and of all videos, by kind, and `video_times` the
        spans of the videos' temporal patches.

        Raises:
            ValueError: samples in more than one row, or with lengths that do not add up to it; and see `assign_media`.
        """
        starts_BN, types_BN = self.media_starts(input_ids, inputs_embeds), mm_token_type_ids
        if packed_lengths is not None:
            B, N = starts_BN.shape
            if B != 1 or sum(packed_lengths) != N or min(packed_lengths) < 1:
                raise ValueError(
                    f"packed_lengths={packed_lengths} must be positive and add up to one row of text, not {B} x {N}."
                )
            starts_BN, types_BN = (
                None if t is None else nn.utils.rnn.pad_sequence(t[0].split(packed_lengths), batch_first=True)
                for t in (starts_BN, types_BN)
            )
        images = list_media("image", pixels["image"], grids["image"])
        videos = list_media("video", pixels["video"], grids["video"], video_times)
        return assign_media(images, videos, starts_BN, types_BN)
