"""The kinds of cases: what is injured, and what is done with it.

`KINDS[name]` holds a function of (rng, materials, folder) that prepares a case in `folder` and returns what uses it.

Where an injury has to be noticed (a tensor is gone, a memory's bytes are others), a result is a failure.
"""

import contextlib
import io
import json
import math
import os
import random
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import yaml
from injuries import (
    copy_folder,
    damage_folder,
    damage_safetensors,
    edit,
    edit_json,
    mutate,
    read_safetensors,
    value,
    write_safetensors,
)
from materials import QUESTION, names
from starlette.testclient import TestClient
from transformers import AutoModelForImageTextToText, AutoProcessor

from vamba import cli, read_video
from vamba.chat import VideoChat, load_chat
from vamba.conversion import convert
from vamba.data import Collator, ConversationEncoder, Mixture, Source, TrainingStream
from vamba.errors import UserError
from vamba.modeling import StateMemory, VideoMemory
from vamba.serving.app import Server
from vamba.serving.media import Media
from vamba.serving.memory_cache import MemoryCache
from vamba.training import finetune
from vamba.training.arguments import load_recipe


READS = (
    {"fps": 1000.0},
    {"num_frames": 3},
    {"fps": 0.5, "threads": 1},
    {"num_frames": 4, "start": 2.0, "end": 31.0},
    {"fps": 0.1, "start": 0.5},
    {"fps": 3.0, "max_pixels": 56 * 56, "min_pixels": 0},
)
MEMORIES = {"vamba": VideoMemory, "video_ma2mba": StateMemory}
_loaded: dict = {}  # what cases of one process share, loaded before they are forked


def load(materials: Path) -> None:
    """Loads what cases share. Nothing is computed here: a process with threads could not be forked."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.cuda.is_available()  # upon which a driver opens pipes, once in each process
    for name in MEMORIES:
        _loaded[name] = AutoModelForImageTextToText.from_pretrained(materials / name).eval()
        _loaded[f"{name} processor"] = AutoProcessor.from_pretrained(materials / name)


def videos(rng: random.Random, materials: Path, folder: Path) -> Callable:
    source = rng.choice(names(materials / "videos"))
    path = folder / f"mutant{source.suffix}"
    path.write_bytes(mutate(source.read_bytes(), rng))
    options = rng.choice(READS)
    if rng.random() < 0.15:
        processor = _loaded["vamba processor"]
        return lambda: processor(text="<|vision_start|><|vision_end|>", videos=[str(path)], num_frames=4).keys()
    return lambda: _read(rng.choice((path, path.read_bytes())), options)


def _read(source, options: dict) -> str:
    last, count = -math.inf, 0
    with read_video(source, **{"resize": False, "chunk_frames": 4, **options}) as reader:
        for chunk in reader:
            assert chunk.frames.shape[2:] == reader.frame_size and 0 < len(chunk) <= reader.chunk_frames
            for stamp in chunk.timestamps.tolist():
                assert math.isfinite(stamp) and stamp >= last, (stamp, last)
                last, count = stamp, count + 1
            assert count <= 1000, "more frames than were ever in the file"
    return f"{count} frames"


def images(rng: random.Random, materials: Path, folder: Path) -> Callable:
    source = rng.choice(names(materials / "images"))
    path = folder / f"mutant{source.suffix}"
    path.write_bytes(mutate(source.read_bytes(), rng))
    processor = _loaded["vamba processor"]
    given = rng.choice((path, str(path), path.read_bytes()))
    kind = rng.randrange(3)
    if kind == 0:
        return lambda: processor(text="<|vision_start|><|vision_end|>", images=[given]).keys()
    if kind == 1:
        return lambda: _read([str(path)], {})
    content = [{"type": "image", "image": given}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]
    return lambda: ConversationEncoder(processor)({"messages": messages}).keys()


def checkpoints(rng: random.Random, materials: Path, folder: Path) -> Callable:
    kind = rng.choice(tuple(MEMORIES))
    checkpoint = copy_folder(materials / kind, folder / "checkpoint")
    needed = ("config.json", "model.safetensors", "tokenizer.json")
    must_refuse = damage_folder(checkpoint, rng, needed)
    return lambda: _refused(must_refuse, _use_checkpoint, checkpoint, materials, rng, kind)


def configurations(rng: random.Random, materials: Path, folder: Path) -> Callable:
    kind = rng.choice(tuple(MEMORIES))
    checkpoint = copy_folder(materials / kind, folder / "checkpoint")
    others = sorted(path for path in checkpoint.glob("*.json") if not path.name.startswith(("config", "tokenizer.")))
    edit_json(checkpoint / "config.json" if rng.random() < 0.7 else rng.choice(others), rng)
    return lambda: _use_checkpoint(checkpoint, materials, rng, kind)


def _refused(must: bool, use: Callable, *arguments):
    said = use(*arguments)
    assert not must, f"it was used although something is missing: {said}"
    return said


def _use_checkpoint(checkpoint: Path, materials: Path, rng: random.Random, kind: str):
    how = rng.randrange(4)
    if how == 0:
        chat = load_chat(str(checkpoint), device="cpu")
        chat.memory = MEMORIES[kind].load(materials / f"{kind}.memory.safetensors")
        try:
            return chat.ask(QUESTION, max_new_tokens=2)
        except ValueError as error:
            if "weights" not in str(error):  # the memory was made by others, as they were damaged
                raise
            return "other weights"
    if how == 1:
        recipe = yaml.safe_load((materials / "recipe.yaml").read_text())
        more = {"model_name_or_path": str(checkpoint), "output_dir": "out", "max_steps": 1}
        return finetune(recipe | more | {"per_device_train_batch_size": 1}).losses
    video = materials / "videos" / "00-libx264.mp4"
    words = ["ask", str(video), QUESTION, "--num-frames", "4", "--max-new-tokens", "2", "--device", "cpu", "--quiet"]
    return _command([*words, "--model", str(checkpoint)])


def _command(words: list[str]) -> str:
    """What a command prints. A mistake of the user comes back as UserError, as it was; a fault is an AssertionError."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as exit:
            code = exit.code
    said = err.getvalue().strip()
    if code == 2:
        assert said and "Traceback" not in said, said
        raise UserError(said.splitlines()[-1])
    assert code == 0, f"exit {code}: {said}"
    return out.getvalue()


def memories(rng: random.Random, materials: Path, folder: Path) -> Callable:
    kind = rng.choice(tuple(MEMORIES))
    sound, path = materials / f"{kind}.memory.safetensors", folder / "memory.safetensors"
    path.write_bytes(sound.read_bytes())
    how = rng.randrange(3)
    if how == 0:
        damage_safetensors(path, rng)
    elif how == 1:
        path.write_bytes(mutate(path.read_bytes(), rng))
    else:
        header, data = read_safetensors(path)
        about = json.loads(header["__metadata__"]["vamba"])
        header["__metadata__"]["vamba"] = json.dumps(edit(about, rng))
        write_safetensors(path, header, data)
    return lambda: _load_memory(path, sound, kind)


def _load_memory(path: Path, sound: Path, kind: str) -> str:
    memory, other = MEMORIES[kind].load(path), MEMORIES[kind].load(sound)
    memory.save(one := path.with_name("one.safetensors"))
    other.save(two := path.with_name("two.safetensors"))
    assert one.read_bytes() == two.read_bytes(), "the memory is another than was saved"
    return "the same memory"


def data(rng: random.Random, materials: Path, folder: Path) -> Callable:
    name = rng.choice(("train.jsonl", "train.jsonl", "list.json"))
    text = (materials / "data" / name).read_bytes()
    how = rng.randrange(4)
    if how == 0:
        text = mutate(text, rng)
    elif name == "list.json":
        text = json.dumps(edit(json.loads(text), rng, _hostile)).encode("utf-8", "surrogatepass")
    else:
        lines = text.splitlines()
        for _ in range(rng.choice((1, 3, 8))):
            index = rng.randrange(len(lines))
            broken = (
                b"",
                b"   ",
                b"5",
                b"null",
                b"[" * 100_000,
                b'"x"',
                b"{",
                b"\xff\xfe",
                b"{}" * 3,
                lines[index][:40],
            )
            with contextlib.suppress(ValueError, RecursionError):
                edited = json.dumps(edit(json.loads(lines[index]), rng, _hostile)).encode("utf-8", "surrogatepass")
                lines[index] = edited if how < 3 else rng.choice(broken)
        text = b"\n".join(lines)
    (folder / "data").mkdir()
    (path := folder / "data" / name).write_bytes(text)
    return lambda: _draw(path, materials)


def questions(rng: random.Random, materials: Path, folder: Path) -> Callable:
    """Questions about videos, or the folder of an evaluation that is gone on with."""
    path, run = folder / "questions.jsonl", folder / "run"
    path.write_bytes((materials / path.name).read_bytes())
    if rng.random() < 0.4:
        path = materials / path.name
        damage_folder(copy_folder(materials / "eval", run), rng)
    elif rng.random() < 0.3:
        path.write_bytes(mutate(path.read_bytes(), rng))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for _ in range(rng.choice((1, 1, 3))):
            rows = edit(rows, rng, _hostile)
        text = "".join(f"{json.dumps(row)}\n" for row in (rows if isinstance(rows, list) else [rows]))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    words = ["eval", str(materials / "vamba"), str(path), "--output-dir", str(run), "--num-frames", "2"]
    return lambda: _command([*words, "--max-new-tokens", "1", "--device", "cpu", "--quiet"])


def _draw(path: Path, materials: Path) -> str:
    source = Source(str(path), media_root=str(materials / "data"), shuffle=False)
    encoder = ConversationEncoder(_loaded["vamba processor"], fps=1, max_frames=4, max_video_tokens=256, max_length=512)
    stream = TrainingStream(Mixture([source]), Collator(encoder), rows=2)
    batches = list(islice(stream.loader(), 3))
    return " ".join(batch["about"].error or f"{len(batch['about'].samples)} samples" for batch in batches)


def _hostile(rng: random.Random):
    """What a message should not hold, media that are none among it."""
    media = (
        "/dev/zero",
        "/dev/stdin",
        "/etc/passwd",
        "/",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "data:,",
    )
    nested = ({"url": "http://127.0.0.1:9/x"}, {"url": "http://127.0.0.1:9/x", "allow_urls": True}, {"path": None})
    if rng.random() < 0.4:
        return rng.choice((*media, *nested))
    return value(rng)


def messages(rng: random.Random, materials: Path, folder: Path) -> Callable:
    os.mkfifo(fifo := folder / "fifo.png")
    items = [
        {"type": "video", "video": str(materials / "videos" / "00-libx264.mp4"), "num_frames": 4},
        {"type": "image", "image": str(materials / "images" / "00.png"), "max_pixels": 64 * 64},
        {"type": "image_url", "image_url": {"url": str(materials / "images" / "05.jpg")}},
        {"type": "video", "video": [str(materials / "images" / "00.png")] * 2},
        {"type": "image", "image": str(fifo)},
    ]
    content = [*rng.sample(items[:4], 2), {"type": "text", "text": QUESTION}]
    if rng.random() < 0.1:
        content.append(items[4])
    told = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "This."}]}]
    for _ in range(rng.choice((1, 1, 2, 3))):
        told = edit(told, rng, _hostile)
    options = {} if rng.random() < 0.8 else {rng.choice(("fps", "num_frames", "min_pixels", "max_pixels")): value(rng)}
    processor = _loaded[f"{rng.choice(tuple(MEMORIES))} processor"]
    if rng.random() < 0.5:
        return lambda: processor.apply_chat_template(told, tokenize=True, return_dict=True, **options).keys()
    encoder = ConversationEncoder(processor, max_video_tokens=512)
    return lambda: encoder({"messages": told}).keys()


def requests(rng: random.Random, materials: Path, folder: Path) -> Callable:
    """Bodies of requests to the server, of which none may be a fault of the server."""
    video = "00-libx264.mp4"
    if is_chat := rng.random() < 0.6:
        content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": QUESTION}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0, "stop": ["x"]}
        body |= {"stream_options": {"include_usage": True}, "mm_processor_kwargs": {"num_frames": 2}}
    else:
        content = [{"type": "input_video", "video_url": video}, {"type": "input_text", "text": QUESTION}]
        body = {"input": [{"role": "user", "content": content}], "instructions": "Be brief.", "max_output_tokens": 2}
    body |= {"model": "fuzz", "stream": rng.random() < 0.3}
    for _ in range(rng.choice((1, 1, 2, 3))):
        body = edit(body, rng, _hostile)
    sent = json.dumps(body).encode("utf-8", "surrogatepass")
    sent = mutate(sent, rng) if rng.random() < 0.1 else sent
    path = "/v1/chat/completions" if is_chat else "/v1/responses"
    return lambda: _post(materials, rng.choice(tuple(MEMORIES)), path, sent)


def _post(materials: Path, kind: str, path: str, body: bytes) -> str:
    chat = VideoChat(_loaded[kind], _loaded[f"{kind} processor"])
    server = Server(chat, "fuzz", MemoryCache(MEMORIES[kind], "cpu"), Media(materials / "videos"))
    with TestClient(server.app(), raise_server_exceptions=False) as client:
        reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
    if reply.status_code >= 500 or "Traceback" in reply.text:
        raise RuntimeError(f"{reply.status_code} {reply.text}")
    if reply.status_code == 200:
        return reply.text
    raise UserError(reply.json()["error"]["message"])


def recipes(rng: random.Random, materials: Path, folder: Path) -> Callable:
    text = (materials / "recipe.yaml").read_text()
    path, overrides = folder / "recipe.yaml", []
    how = rng.randrange(4)
    if how == 0:
        path.write_bytes(mutate(text.encode(), rng))
    elif how == 1:
        key = rng.choice(sorted(yaml.safe_load(text)))
        overrides = [rng.choice((f"--{key}", f"--{key}x", "--", "x", "-1")), f"{value(rng)}"]
        path.write_text(text)
    elif how == 2:
        hostile = (
            "[" * 5000,
            "a: &a [x]\nb: *a\n" * 3,
            "!!python/object/apply:os.system [true]",
            "a: 1\na: 2",
            "- 1",
            "\t: x",
        )
        path.write_text(rng.choice(hostile))
    else:
        edited = edit(yaml.safe_load(text), rng)
        path.write_bytes(yaml.dump(edited, allow_unicode=True).encode("utf-8", "surrogatepass"))
    return lambda: load_recipe(path, overrides).training.output_dir


def arguments(rng: random.Random, materials: Path, folder: Path) -> Callable:
    """Public functions with one argument, of those that they have, that is none."""
    video, wrong = str(materials / "videos" / "00-libx264.mp4"), value(rng)
    name = rng.choice(("vamba", "video_ma2mba"))
    chat = load_chat(str(materials / name), device="cpu")
    chat.memory = MEMORIES[name].load(materials / f"{name}.memory.safetensors")
    reading = (
        "fps num_frames centered start end min_pixels max_pixels total_pixels resized_height resized_width min_side "
        "max_side factor chunk_frames backend threads source_fps"
    ).split()
    asking = "max_new_tokens min_new_tokens temperature top_k top_p num_beams repetition_penalty".split()
    options = {rng.choice(reading): wrong}
    command = ["ask", video, QUESTION, "--model", str(materials / name), "--quiet", "--num-frames", "4"]
    flag = rng.choice(("--fps", "--num-frames", "--start", "--end", "--max-pixels", "--device", "--max-new-tokens"))
    return rng.choice(
        (
            lambda: _read(video, options),
            lambda: _read(wrong, {"num_frames": 2}),
            lambda: chat.watch(video, progress=False, **({"num_frames": 4} | options)),
            lambda: chat.watch(wrong, progress=False),
            lambda: chat.ask(wrong, max_new_tokens=2),
            lambda: chat.ask(QUESTION, **({"max_new_tokens": 2} | {rng.choice(asking): wrong})),
            lambda: chat.memory.save(wrong),
            lambda: MEMORIES[name].load(wrong),
            lambda: load_chat(str(materials / name), device=wrong),
            lambda: load_chat(str(materials / name), dtype=wrong, device="cpu"),
            lambda: load_chat(wrong),
            lambda: _command([*command, "--max-new-tokens", "2", flag, f"{wrong}".replace("\0", "")]),
            lambda: _command([*command[:2], f"{wrong}".replace("\0", ""), *command[3:], "--max-new-tokens", "2"]),
        )
    )


def models(rng: random.Random, materials: Path, folder: Path) -> Callable:
    """Tensors that do not fit each other, given to the models."""
    name = rng.choice(tuple(MEMORIES))
    model, processor = _loaded[name], _loaded[f"{name} processor"]
    size = 48 if name == "video_ma2mba" else 64
    frames = torch.zeros(4, 3, size, size, dtype=torch.uint8)
    inputs = dict(processor(text=f"<|vision_start|><|vision_end|>{QUESTION}", videos=[frames], return_tensors="pt"))
    inputs["labels"] = inputs["input_ids"].clone()
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(sorted(inputs))
        if (tensor := inputs[key]) is None or tensor.dim() < 2:
            continue
        shapes = [tensor[:0], tensor[:, :0], tensor[:1, :1], tensor[None], tensor.float(), tensor.flatten()]
        shapes += [
            -1000 * tensor.long(),
            torch.cat([tensor, tensor]),
            torch.zeros_like(tensor),
            tensor * 10**6,
            tensor.bool(),
            None,
        ]
        inputs[key] = rng.choice(shapes)
    if rng.random() < 0.5:
        with torch.no_grad():
            return lambda: model(**inputs).logits.shape
    inputs.pop("labels", None)
    return lambda: model.generate(**inputs, max_new_tokens=2).shape


def resumed(rng: random.Random, materials: Path, folder: Path) -> Callable:
    """A training goes on from a checkpoint of which a file is damaged."""
    output = copy_folder(materials / "run", folder / "run")
    damage_folder(rng.choice(sorted(output.glob("checkpoint-*"))), rng)
    recipe = yaml.safe_load((materials / "recipe.yaml").read_text())
    recipe |= {"output_dir": str(output), "max_steps": 3}
    return lambda: finetune(recipe, resume=True).steps


def conversions(rng: random.Random, materials: Path, folder: Path) -> Callable:
    kind = rng.choice(("qwen", "vamba", "mamba2"))
    sources = {name: copy_folder(materials / name, folder / name) for name in (kind, "clip")}
    damaged = rng.choice((kind, "clip" if kind == "mamba2" else kind))
    must_refuse = damage_folder(sources[damaged], rng, ("config.json", "model.safetensors"))
    must_refuse = must_refuse and damaged != "clip"  # whose last layer is not read
    options = {"vision": sources["clip"]} if kind == "mamba2" else {}
    return lambda: _refused(must_refuse, _convert, sources[kind], folder / "converted", options)


def _convert(source: Path, destination: Path, options: dict) -> str:
    try:
        convert(source, destination, progress=False, **options)
    finally:
        left = sorted(path.name for path in destination.parent.glob(f"{destination.name}*"))
        assert left in ([], [destination.name]), left
        assert not destination.exists() or (destination / "config.json").is_file()
    return "converted"


# what is injured -> the preparation, and how often it is drawn
KINDS: dict[str, tuple[Callable, int]] = {
    "videos": (videos, 5),
    "images": (images, 5),
    "checkpoints": (checkpoints, 2),
    "configurations": (configurations, 3),
    "conversions": (conversions, 2),
    "memories": (memories, 3),
    "data": (data, 3),
    "questions": (questions, 2),
    "messages": (messages, 3),
    "requests": (requests, 3),
    "recipes": (recipes, 2),
    "arguments": (arguments, 3),
    "models": (models, 2),
    "resumed": (resumed, 1),
}
