"""Prefill, decoding and memory against the length of the video, for ours and for a peer, one after the other.

What is unusual: frames are random patches made on the device a chunk at a time, so that no video fills the memory.
A criterion of `generate` takes the time after each token: the first one ends the prefill. Beside each time stands its
floor: the operations of the matrix products at the matrix rate, or the bytes of one decoding step at the copy rate,
both rates measured here.
"""

import gc
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import StoppingCriteria

from vamba.errors import UserError
from vamba.modeling import VideoMemory

from .models import linear_weights, load_ours, load_peer


REPEATS, REPEAT_SECONDS = 3, 15  # a length is measured again until one of the two is reached


@torch.no_grad()
def measure_all(args: Namespace) -> dict:
    """{"machine", "lengths", "parts", "kernels", "videos"}: facts, and tables as lists of rows; see `report`."""
    from .parts import measure_kernels, measure_parts, measure_videos

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current one
    model = load_ours(args.model, device)
    rates = measure_rates(device, model.dtype)
    ours = Ours(model, args)
    lengths = measure_lengths(ours, args, rates)
    parts, kernels = measure_parts(ours, rates), measure_kernels(ours)
    config, dtype, facts = model.config, model.dtype, describe(ours, rates)
    del model, ours
    release(device)
    if args.peer:
        lengths += measure_lengths(Peer(load_peer(config, device, dtype), args), args, rates)
        release(device)
    return {
        "machine": facts,
        "lengths": lengths,
        "parts": parts,
        "kernels": kernels,
        "videos": measure_videos(args.video, config.vision_config),
    }


def measure_lengths(subject: "Ours | Peer", args: Namespace, rates: dict) -> list[dict]:
    """One row for each number of frames, in rising order; after one that does not fit, none is tried."""
    rows, full, last = [], False, None
    for frames in sorted(set(args.frames)):
        row = {"model": subject.name, "frames": frames, "video_tokens": subject.tokens(frames), "status": "ok"}
        rows.append(row)
        expected = last["prefill_s"] * (frames / last["frames"]) ** subject.growth if last else 0
        if full:
            row["status"] = "not tried: a shorter one ran out of memory"
        elif expected > args.max_seconds:
            row["status"] = f"not tried: about {expected:.0f} s, more than --max-seconds {args.max_seconds:g}"
        else:
            try:
                if last is None:
                    subject.run(frames)  # kernels are compiled, handles made
                row.update(measure_length(subject, frames, rates))
                last = row
            except torch.OutOfMemoryError:
                row["status"], full = "out of memory", True
            release(subject.device)
        print(row, file=sys.stderr, flush=True)
    return rows


def measure_length(subject: "Ours | Peer", frames: int, rates: dict) -> dict:
    """Medians over up to three runs, with their floors."""
    runs, start = [], time.perf_counter()
    while len(runs) < REPEATS and (not runs or time.perf_counter() - start < REPEAT_SECONDS):
        release(subject.device)
        runs.append(subject.run(frames))
    row = {name: statistics.median(run[name] for run in runs) for name in runs[0] if runs[0][name] is not None}
    return {
        **row,
        "prefill_floor_s": subject.prefill_operations(frames) / rates["matrix_per_s"],
        "decode_floor_ms": 1e3 * subject.decode_bytes(row["video_memory_bytes"]) / rates["copied_bytes_per_s"],
        "tokens_per_s": 1e3 / row["decode_ms"],
        "frames_per_s": frames / row["prefill_s"],
        "runs": len(runs),
    }


class Ours:
    """Vamba: the video is encoded chunk by chunk, then `generate` answers from a static text cache."""

    growth = 1  # of the prefill with the number of frames

    def __init__(self, model, args: Namespace):
        self.name, self.model, self.args, self.device = "vamba", model, args, model.device
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
        prompt, chunks, clock = self.prompt(), Stopwatch(self.device), Clock(self.device)
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

    def generate(self, ids: Tensor, clock: "Clock", **inputs) -> None:
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
        M, language, keys_values = self.tokens(frames), core.language_model, self.key_value_weights()
        encoder = M * (linear_weights(core.video_encoder) + keys_values)
        prompt = N * (linear_weights(language) - keys_values) + linear_weights(self.model.lm_head)
        reading = 4 * N * M * text.hidden_size * text.num_hidden_layers
        return self.vision_operations(frames) + 2 * (encoder + prompt) + reading

    def key_value_weights(self) -> int:
        layers = self.model.model.language_model.layers
        return sum(linear_weights(layer.cross_attn.k_proj, layer.cross_attn.v_proj) for layer in layers)

    def decode_bytes(self, memory_bytes: int) -> int:
        weights = linear_weights(self.model.model.language_model, self.model.lm_head) - self.key_value_weights()
        return weights * self.model.dtype.itemsize + memory_bytes


class Peer(Ours):
    """transformers' Qwen2-VL: the video's tokens stand in the prompt, and `generate` does all."""

    growth = 2

    def __init__(self, model, args: Namespace):
        super().__init__(model, args)
        self.name = "qwen2-vl"

    def run(self, frames: int) -> dict:
        config, clock, M = self.model.config, Clock(self.device), self.tokens(frames)
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

    def key_value_weights(self) -> int:
        return 0


class Clock(StoppingCriteria):
    """Never stops; notes when each token is there."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.times.append(now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def milliseconds_per_token(self) -> float:
        return 1e3 * statistics.median(b - a for a, b in zip(self.times, self.times[1:]))


class Stopwatch:
    """Seconds between marks, taken on the device without waiting for it."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        now(self.device)
        return [self.between(a, b) for a, b in zip(self.marks, self.marks[1:])]

    def between(self, first, last) -> float:
        return first.elapsed_time(last) / 1e3 if self.device.type == "cuda" else last - first


def last_to_first(chunks: list[float]) -> float | None:
    """Time of the last tenth of the whole chunks over that of the first; None where there are too few."""
    tenth = len(chunks) // 10
    return sum(chunks[-tenth - 1 : -1]) / sum(chunks[1 : tenth + 1]) if tenth else None  # the ends are irregular


def measure_rates(device: torch.device, dtype: torch.dtype) -> dict:
    """Operations per second of a large matrix product, and bytes read and written per second by a large copy."""
    size, numbers = (8192, 2**30) if device.type == "cuda" else (256, 2**22)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    source = torch.empty(numbers, dtype=dtype, device=device).normal_()
    copy = torch.empty_like(source)
    return {
        "matrix_per_s": 2 * size**3 / seconds_of(lambda: a @ b, device),
        "copied_bytes_per_s": 2 * source.nbytes / seconds_of(lambda: copy.copy_(source), device),
    }


def seconds_of(function: Callable, device: torch.device) -> float:
    """Median of ten calls, after three."""
    watch = Stopwatch(device)
    for _ in range(14):
        watch.mark()
        function()
    return statistics.median(watch.seconds()[3:])


def describe(ours: Ours, rates: dict) -> dict:
    """What a report names: machine, versions, command, sizes, rates."""
    import platform

    import transformers

    model, args, cuda = ours.model, ours.args, ours.device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["vamba", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(model.device) if cuda else f"{platform.machine()} CPU",
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "weights_GiB": round(ours.weights_bytes / 2**30, 2) if cuda else None,
        "patches of a frame": "x".join(map(str, args.patches)),
        "prompt tokens": args.prompt_tokens,
        "matrix products, TFLOP/s": round(rates["matrix_per_s"] / 1e12, 2),
        "copies, TB/s": round(rates["copied_bytes_per_s"] / 1e12, 3),
    }


def now(device: torch.device) -> float:
    """The time, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device, baseline: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - baseline if device.type == "cuda" else None


def release(device: torch.device) -> None:
    """Gives back what nobody holds, so that one measurement does not weigh on the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
