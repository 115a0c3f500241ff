"""Sound inputs of every kind, from which the cases are made: small, and the same in every run."""

import json
import os
from pathlib import Path

import av
import numpy as np
import torch
import yaml
from PIL import Image

from vamba.chat import load_chat
from vamba.conversion import convert
from vamba.demo.tiny_checkpoints import MIXER, make_tiny_clip, make_tiny_mamba2, make_tiny_qwen2_vl
from vamba.evaluation import evaluate
from vamba.training import finetune


# container, codec, pixel format
VIDEOS = (
    ("mp4", "libx264", "yuv420p"),
    ("mp4", "libx265", "yuv420p"),
    ("mov", "prores_ks", "yuva444p10le"),
    ("mov", "png", "rgba"),
    ("mov", "qtrle", "rgb24"),
    ("matroska", "libx264", "yuv420p"),
    ("matroska", "ffv1", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("webm", "libsvtav1", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "mjpeg", "yuvj420p"),
    ("avi", "huffyuv", "rgb24"),
    ("mpegts", "libx264", "yuv420p"),
    ("mpegts", "mpeg2video", "yuv420p"),
    ("mpeg", "mpeg1video", "yuv420p"),
    ("flv", "flv", "yuv420p"),
    ("ogg", "libvpx", "yuv420p"),
    ("asf", "wmv2", "yuv420p"),
    ("mxf", "mpeg2video", "yuv420p"),
    ("nut", "ffv1", "yuv420p"),
    ("gif", "gif", "rgb8"),
    ("apng", "apng", "rgba"),
    ("h264", "libx264", "yuv420p"),
)
# suffix, mode, options of Pillow
IMAGES = (
    ("png", "RGB", {}),
    ("png", "RGBA", {}),
    ("png", "P", {}),
    ("png", "I;16", {}),
    ("png", "1", {}),
    ("jpg", "RGB", {"quality": 80}),
    ("jpg", "RGB", {"progressive": True}),
    ("jpg", "CMYK", {}),
    ("jpg", "L", {}),
    ("gif", "P", {"save_all": True, "pages": 3}),
    ("webp", "RGB", {}),
    ("webp", "RGBA", {"lossless": True}),
    ("webp", "RGB", {"save_all": True, "pages": 3}),
    ("bmp", "RGB", {}),
    ("tiff", "RGB", {}),
    ("tiff", "RGB", {"compression": "tiff_lzw"}),
    ("tiff", "RGB", {"compression": "tiff_adobe_deflate", "save_all": True, "pages": 3}),
    ("tiff", "1", {"compression": "group4"}),
    ("ppm", "RGB", {}),
    ("jp2", "RGB", {}),
    ("avif", "RGB", {}),
)
QUESTION = "What happens in the video?"


def make(folder: Path) -> None:
    """Writes videos/, images/, vamba/ and video_ma2mba/ (checkpoints), *.memory.safetensors, data/train.jsonl,
    recipe.yaml and run/ (a training with two checkpoints to resume), questions.jsonl and eval/ (what was answered)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("videos", "images", "data"):
        (folder / name).mkdir(parents=True)
    for index, video in enumerate(VIDEOS):
        _write_video(folder / "videos" / f"{index:02}-{video[1]}.{video[0]}", *video)
    writable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    for index, image in enumerate(image for image in IMAGES if f".{image[0]}" in writable):  # Pillow < 11.3: no AVIF
        _write_image(folder / "images" / f"{index:02}.{image[0]}", *image[1:])
    make_tiny_qwen2_vl(folder / "qwen", [QUESTION])
    convert(folder / "qwen", folder / "vamba", mamba_config=MIXER, progress=False)
    make_tiny_mamba2(folder / "mamba2", [QUESTION])
    make_tiny_clip(folder / "clip")
    convert(folder / "mamba2", folder / "video_ma2mba", vision=folder / "clip", progress=False)
    for name in ("vamba", "video_ma2mba"):
        chat = load_chat(str(folder / name), device="cpu")
        chat.watch(folder / "videos" / "00-libx264.mp4", num_frames=4, progress=False)
        chat.memory.save(folder / f"{name}.memory.safetensors")
    _write_data(folder)
    recipe = _recipe(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    finetune(recipe | {"output_dir": str(folder / "run"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1})
    _write_questions(folder / "questions.jsonl", folder / "videos")
    options = {"reading": {"num_frames": 2}, "max_new_tokens": 1, "progress": False, "device": "cpu"}
    evaluate(str(folder / "vamba"), folder / "questions.jsonl", folder / "eval", **options)


def _write_video(path: Path, container: str, codec: str, pix_fmt: str, count: int = 12) -> None:
    """One picture a second and a key frame every four: a small file in which the reader nevertheless jumps."""
    with av.open(str(path), "w", format=container) as file:
        rate = 25 if codec.startswith("mpeg") else 1
        stream = file.add_stream(codec, rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.gop_size = pix_fmt, 4
        stream.codec_context.thread_count = 1
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        for _ in range(count):
            picture = np.roll(picture, 1, 0)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)))
        file.mux(stream.encode(None))


def _write_image(path: Path, mode: str, options: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    options = dict(options)
    pages = [Image.fromarray(np.roll(pixels, 4 * page, 1)) for page in range(options.pop("pages", 1))]
    if mode == "I;16":
        pages = [Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)]
    else:
        pages = [page.convert(mode) for page in pages]
    more = {"append_images": pages[1:]} if options.get("save_all") else {}
    pages[0].save(path, **options, **more)


def _write_data(folder: Path) -> None:
    media = [{"type": "video", "video": f"../videos/{name}"} for name in ("00-libx264.mp4", "10-mpeg4.avi")]
    media += [{"type": "image", "image": f"../images/{name}"} for name in ("00.png", "05.jpg")]
    with open(folder / "data" / "train.jsonl", "w") as file:
        for index in range(8):
            content = [media[index % len(media)], {"type": "text", "text": QUESTION}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Number {index}."}]
            file.write(json.dumps({"id": f"v{index}", "messages": turns}) + "\n")
    llava = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "This."}]
    rows = [{"id": 1, "video": "../videos/00-libx264.mp4", "conversations": llava}]
    (folder / "data" / "list.json").write_text(json.dumps(rows * 3))


def _write_questions(path: Path, videos: Path) -> None:
    row = {"video": str(videos / "00-libx264.mp4"), "question": QUESTION, "category": "all", "start": 0, "end": 9.5}
    options = {"options": ["red", "green", "blue"], "answer": "B", "duration": 12.0}
    rows = [row | options, row | {"answer": ["this", "that"]}, row | {"video": [row["video"]] * 2}, row | options]
    path.write_text("".join(f"{json.dumps(row | {'id': f'q{n}'})}\n" for n, row in enumerate(rows)))


def _recipe(folder: Path) -> dict:
    return {
        "model_name_or_path": str(folder / "vamba"),
        "dtype": "float32",
        "datasets": [{"path": str(folder / "data" / "train.jsonl"), "weight": 1.0}],
        "trainable": ["all"],
        "fps": 1,
        "max_frames": 4,
        "max_video_tokens": 256,
        "max_length": 512,
        "output_dir": "out",
        "max_steps": 2,
        "learning_rate": 1e-3,
        "learning_rates": {"lm_head": 1e-4},
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }


def names(folder: Path) -> list[Path]:
    """The files of a folder in order, those in its subfolders too."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and os.path.getsize(path))
