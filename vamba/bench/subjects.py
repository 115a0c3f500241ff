"""What `vamba bench` measures: ours and a peer, how each is run, and what its matrix products and bytes come to.

What is unusual: frames are random patches made on the device a chunk at a time, so that no video fills the memory.
"""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor

from vamba.errors import UserError
from vamba.modeling import VideoMemory

from .clock import Stopwatch, TokenClock, allocated, last_to_first, now, peak, reset_peak
from .models import linear_weights


class Ours:
    """Vamba: the video is encoded chunk by chunk, then `generate` answers from a static text cache."""

    name, growth = "vamba", 1  # of the prefill with the number of frames

    def __init__(self, model, args: Namespace):
        self.model, self.args, self.device = model, args, model.device
        self.weights_bytes = allocated(model.device)
        vision = model.config.vision_config
        self.temporal = vision.temporal_patch_size
        self.merged = vision.spatial_merge_size**2
        self.patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        if args.patches[0] % vision.spatial_merge_size or args.patches[1] % vision.spatial_merge_size:
            raise UserError(f"--patches {args.patches} must be multiples of {vision.spatial_merge_size}.")

    def steps(self, frames: int) -> int:
        """Temporal patches of so many frames."""
        return -(-frames // self.temporal)

    def tokens(self, frames: int) -> int:
        return self.steps(frames) * self.args.patches[0] * self.args.patches[1] // self.merged

    def patches(self, steps: int) -> tuple[Tensor, Tensor]:
        """Random patches of so many temporal patches, and their grid."""
        h, w = self.args.patches
        pixels = torch.empty(steps * h * w, self.patch_size, dtype=self.model.dtype, device=self.device)
        return pixels.normal_(), torch.tensor([[steps, h, w]], device=self.device)

    def prompt(self) -> Tensor:
        """Random words, away from both ends of the vocabulary, where special tokens are."""
        vocabulary = self.model.config.text_config.vocab_size
        ids = torch.randint(vocabulary // 10, vocabulary // 2, (1, self.args.prompt_tokens))
        return ids.to(self.device)

    def encode(self, frames: int, mark: Callable = lambda: None):
        """The memory of so many frames; `mark` is called after each chunk."""
        memory = VideoMemory(self.model.config)
        memory.reserve(self.tokens(frames))  # as `VideoChat.watch` does
        left, chunk = self.steps(frames), self.steps(self.args.chunk_frames)
        while left:
            pixels, grid = self.patches(min(left, chunk))
            memory = self.model.encode_video(pixels, grid, memory=memory, chunk_frames=self.args.chunk_frames)
            left -= min(left, chunk)
            mark()
        return memory

    def run(self, frames: int) -> dict:
        prompt, chunks, clock = self.prompt(), Stopwatch(self.device), TokenClock(self.device)
        reset_peak(self.device)
        start = now(self.device)
        chunks.mark()
        memory = self.encode(frames, chunks.mark)
        encoded = now(self.device)
        length = self.args.prompt_tokens + self.args.new_tokens
        self.generate(prompt, clock, past_key_values=memory.fork(max_cache_len=length))
        return {
            "prefill_s": clock.times[0] - start,
            "encode_s": encoded - start,
            "prompt_s": clock.times[0] - encoded,
            "decode_ms": clock.milliseconds_per_token(),
            "last_to_first": last_to_first(chunks.seconds()),
            "peak_over_weights_bytes": peak(self.device, self.weights_bytes),
            "video_memory_bytes": memory.video_nbytes,
        }

    def generate(self, ids: Tensor, clock: TokenClock, **inputs) -> None:
        new = {"min_new_tokens": self.args.new_tokens, "max_new_tokens": self.args.new_tokens}
        self.model.generate(ids, do_sample=False, stopping_criteria=[clock], **new, **inputs)

    def vision_operations(self, frames: int) -> int:
        vision, visual = self.model.config.vision_config, self.model.model.visual
        h, w = self.args.patches
        patches, tokens = self.steps(frames) * h * w, self.tokens(frames)
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        attention = 4 * patches * h * w * width * vision.depth
        products = patches * linear_weights(visual.patch_embed, visual.blocks) + tokens * linear_weights(visual.merger)
        return 2 * products + attention

    def prefill_operations(self, frames: int) -> int:
        core, text, N = self.model.model, self.model.config.text_config, self.args.prompt_tokens
        M = self.tokens(frames)
        encoder = M * linear_weights(core.video_encoder)
        prompt = N * linear_weights(core.language_model) + linear_weights(self.model.lm_head)
        reading = 4 * N * M * text.hidden_size * text.num_hidden_layers
        return self.vision_operations(frames) + 2 * (encoder + prompt) + reading


class Peer(Ours):
    """transformers' Qwen2-VL: the video's tokens stand in the prompt, and `generate` does all."""

    name, growth = "qwen2-vl", 2

    def run(self, frames: int) -> dict:
        config, clock, M = self.model.config, TokenClock(self.device), self.tokens(frames)
        video = torch.full((1, M), config.video_token_id, device=self.device)
        start, end = (torch.full((1, 1), t, device=self.device)
                      for t in (config.vision_start_token_id, config.vision_end_token_id))  # fmt: skip
        ids = torch.cat([start, video, end, self.prompt()], 1)
        pixels, grid = self.patches(self.steps(frames))
        reset_peak(self.device)
        begin = now(self.device)
        kinds = 2 * (ids == config.video_token_id).int()
        self.generate(ids, clock, pixel_values_videos=pixels, video_grid_thw=grid, mm_token_type_ids=kinds)
        text = config.text_config
        numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
        return {
            "prefill_s": clock.times[0] - begin,
            "decode_ms": clock.milliseconds_per_token(),
            "peak_over_weights_bytes": peak(self.device, self.weights_bytes + pixels.nbytes),
            "video_memory_bytes": ids.shape[1] * numbers * self.model.dtype.itemsize,
        }

    def prefill_operations(self, frames: int) -> int:
        text, N = self.model.config.text_config, self.tokens(frames) + self.args.prompt_tokens + 2
        products = N * linear_weights(self.model.model.language_model) + linear_weights(self.model.lm_head)
        attention = 2 * N * N * text.hidden_size * text.num_hidden_layers  # half of it is masked
        return self.vision_operations(frames) + 2 * products + attention
