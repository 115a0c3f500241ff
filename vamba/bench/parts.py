"""Where the time goes: the model's parts in one chunk and one prompt, a Mamba-2 block's kernels, decoding of files.

What is unusual: a part is a set of modules, timed by hooks while the model runs as always; what a module does beside
the modules inside it is a part as well, the difference of the two.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vamba.demo.videos import write_video
from vamba.video import read_video

from .clock import Stopwatch, TokenClock, kernels_of, now
from .models import linear_weights
from .subjects import Ours


@dataclass
class Part:
    """Modules, less those inside them; floors by operations and by bytes, whichever are more."""

    name: str
    modules: list[nn.Module]
    operations: int = 0
    size: int = 0
    less: list[nn.Module] = field(default_factory=list)


def measure_parts(ours: Ours, rates: dict) -> list[dict]:
    """Rows (part, calls, ms, floor_ms) of encoding one chunk and of reading one prompt about it."""
    frames = ours.args.chunk_frames
    memory, clock = ours.encode(frames), TokenClock(ours.device)
    ours.generate(ours.prompt(), clock, past_key_values=memory.fork())  # kernels are compiled
    parts = [*_vision_parts(ours), *_encoder_parts(ours), *_prompt_parts(ours)]

    def run():
        memory = ours.encode(frames)
        ours.model(ours.prompt(), past_key_values=memory.fork(), use_cache=True, logits_to_keep=1)

    times = time_modules({module for part in parts for module in (*part.modules, *part.less)}, run, ours.device)
    rows = []
    for part in parts:
        calls = sum(len(times[module]) for module in part.modules)
        seconds = sum(sum(times[m]) for m in part.modules) - sum(sum(times[m]) for m in part.less)
        floor = max(part.operations / rates["matrix_per_s"], part.size / rates["copied_bytes_per_s"])
        if calls:  # a kernel may have taken the place of a module
            rows.append({"part": part.name, "calls": calls, "ms": 1e3 * seconds, "floor_ms": 1e3 * floor})
    return rows


def time_modules(modules: Iterable[nn.Module], run: Callable, device: torch.device) -> dict[nn.Module, list[float]]:
    """Seconds of each call of each module while `run` runs."""
    watch, calls = Stopwatch(device), {module: [] for module in modules}

    def before(module, args):
        watch.mark()
        calls[module].append([len(watch.marks) - 1])

    def after(module, args, output):
        watch.mark()
        calls[module][-1].append(len(watch.marks) - 1)

    hooks = [m.register_forward_pre_hook(before) for m in calls] + [m.register_forward_hook(after) for m in calls]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    now(device)
    return {m: [watch.between(watch.marks[a], watch.marks[b]) for a, b in spans] for m, spans in calls.items()}


def _products(name: str, modules: list[nn.Module], tokens: int) -> Part:
    return Part(name, modules, 2 * tokens * linear_weights(*modules))


def _vision_parts(ours: Ours) -> list[Part]:
    """The tower as a whole, and, of Qwen2-VL's, its parts over all blocks."""
    model, config, frames = ours.model.model, ours.model.config.vision_config, ours.args.chunk_frames
    whole = Part("vision tower", [model.visual], ours.vision_operations(frames))
    if config.model_type != "qwen2_vl_vision":
        return [whole]
    h, w = ours.args.patches
    T, M, blocks = ours.steps(frames) * h * w, ours.tokens(frames), list(model.visual.blocks)
    row = T * config.embed_dim * ours.model.dtype.itemsize * len(blocks)  # bytes of the stream, through all blocks
    qkv, proj = [block.attn.qkv for block in blocks], [block.attn.proj for block in blocks]
    attention = 4 * T * h * w * config.embed_dim * len(blocks)
    return [
        whole,
        _products("vision tower: patch embedding", [model.visual.patch_embed], T),
        Part("vision tower: norm", [block.norm1 for block in blocks], size=2 * row),
        _products("vision tower: qkv", qkv, T),
        Part("vision tower: rotation and attention", [block.attn for block in blocks], attention, less=[*qkv, *proj]),
        _products("vision tower: output of attention", proj, T),
        Part("vision tower: residual and norm", [block.norm2 for block in blocks], size=4 * row),
        _products("vision tower: fc1", [block.mlp.fc1 for block in blocks], T),
        Part("vision tower: activation", [block.mlp.act for block in blocks], size=int(2 * row * config.mlp_ratio)),
        _products("vision tower: fc2", [block.mlp.fc2 for block in blocks], T),
        _products("vision tower: merger", [model.visual.merger], M),
    ]


def _encoder_parts(ours: Ours) -> list[Part]:
    levels, config = ours.model.model.video_encoder.levels, ours.model.config.mamba_config
    blocks = [level.block for level in levels if level.block is not None]
    mixers, M = [block.mixer for block in blocks], ours.tokens(ours.args.chunk_frames)
    row = M * ours.model.dtype.itemsize * len(blocks)  # bytes of one number per token, through all blocks
    inside = [module for mixer in mixers for module in (mixer.in_proj, mixer.norm, mixer.out_proj)]
    inner, scanned = config.intermediate_size, config.conv_dim + config.num_heads + config.intermediate_size
    return [
        _products("Mamba-2 blocks", blocks, M),
        Part("Mamba-2 blocks: norm", [block.norm for block in blocks], size=2 * row * config.hidden_size),
        _products("Mamba-2 blocks: in_proj", [mixer.in_proj for mixer in mixers], M),
        Part("Mamba-2 blocks: convolution and scan", mixers, size=row * scanned, less=inside),
        Part("Mamba-2 blocks: gated norm", [mixer.norm for mixer in mixers], size=3 * row * inner),
        _products("Mamba-2 blocks: out_proj", [mixer.out_proj for mixer in mixers], M),
        _products("video keys and values", [m for level in levels for m in (level.k_proj, level.v_proj)], M),
    ]


def _prompt_parts(ours: Ours) -> list[Part]:
    language, N, text = ours.model.model.language_model, ours.args.prompt_tokens, ours.model.config.text_config
    cross, item = [layer.cross_attn for layer in language.layers], ours.model.dtype.itemsize
    weights, queries = linear_weights(language), linear_weights(*cross)
    reading = 4 * N * ours.tokens(ours.args.chunk_frames) * text.hidden_size * len(cross)
    return [
        Part("prompt", [language], 2 * N * weights + reading, weights * item),
        Part("prompt: reading the video", cross, 2 * N * queries + reading, queries * item),
    ]


def measure_kernels(ours: Ours) -> list[dict]:
    """Rows (kernel, calls, ms) of one Mamba-2 block over one chunk; operators where there is no GPU."""
    block, config = ours.model.model.video_encoder.levels[0].block, ours.model.config.mamba_config
    shape = (1, ours.tokens(ours.args.chunk_frames), config.hidden_size)
    vision_BSD = torch.randn(shape, device=ours.device).to(ours.model.dtype)
    _, state = block(vision_BSD, None, None)
    return kernels_of(lambda: block(vision_BSD, state, None), ours.device)[:16]


def measure_videos(files: list[str] | None, vision) -> list[dict]:
    """How fast files are read and resized, at 1 frame per second and every frame; a clip made here for None."""
    with tempfile.TemporaryDirectory() as folder:
        files = files or [make_clip(Path(folder) / "synthetic_720p30.mp4")]
        return [_read(file, every, vision) for file, every in itertools.product(files, (False, True))]


def _read(file: str | Path, every: bool, vision) -> dict:
    factor = vision.patch_size * vision.spatial_merge_size
    with read_video(file, factor=factor, max_pixels=640 * 364) as reader:
        info = reader.metadata
    start = time.perf_counter()
    with read_video(file, factor=factor, max_pixels=640 * 364, fps=info.fps if every else 1.0) as reader:
        kept = sum(len(chunk) for chunk in reader)
    seconds = time.perf_counter() - start
    duration = info.duration or kept / (info.fps if every else 1.0)
    return {
        "video": Path(file).name,
        "kept": "every frame" if every else "1 a second",
        "frames": kept,
        "seconds": seconds,
        "decoded_frames_per_s": duration * info.fps / seconds,
        "times_real_time": duration / seconds,
    }


def make_clip(path: Path, seconds: int = 20, fps: int = 30, width: int = 1280, height: int = 720) -> Path:
    """H.264 of a moving texture, a picture that a codec has some work with."""
    texture = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    return write_video(path, (np.roll(texture, 3 * index, 1) for index in range(seconds * fps)), fps, crf=23)
