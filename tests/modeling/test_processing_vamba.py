"""VambaProcessor against Qwen2-VL's own image and video processors, over every way of passing text and media."""

import base64
import copy
import io
import pathlib

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

import vamba
from vamba import VideoReadError
from vamba.demo.tiny_checkpoints import CHAT_TEMPLATE, tiny_tokenizer
from vamba.modeling import VambaProcessor


START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
PATCH, AREA = 4, 32 * 48  # frames of 64 x 96 are halved
BARE_TEMPLATE = CHAT_TEMPLATE.replace(IMAGE, "").replace(VIDEO, "")
PER_PAIR = 8 * 12  # patches of one pair of frames


@pytest.fixture(scope="module")
def processor():
    options = {"patch_size": PATCH, "size": {"shortest_edge": 8 * 8, "longest_edge": AREA}}
    tokenizer = tiny_tokenizer(["what happens in the video"])
    return VambaProcessor(
        Qwen2VLImageProcessor(**options), tokenizer, Qwen2VLVideoProcessor(**options), chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def frames():
    """10 frames (T, H, W, 3), each of one grey."""
    return np.stack([np.full((64, 96, 3), 20 * i, np.uint8) for i in range(10)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, frames):
    folder = tmp_path_factory.mktemp("media")
    with av.open(str(folder / "clip.mp4"), "w") as container:  # 10 frames at 5 per second
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (folder / "stills").mkdir()
    for i, frame in enumerate(frames[:4]):
        Image.fromarray(frame).save(folder / "stills" / f"{i}.png")
    return folder


def say(*content, **options):
    return [{"role": "user", "content": [*content, {"type": "text", "text": "what happens"}], **options}]


def chat(processor, messages, **kwargs):
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"} | kwargs
    return processor.apply_chat_template(messages, **kwargs)


def marks(inputs, processor):
    """The type ids at the `<|vision_start|>`s, row by row, after checking that all else is 0."""
    starts = inputs["input_ids"] == processor.vision_start_token_id
    assert not inputs["mm_token_type_ids"][~starts].any()
    return [types[row].tolist() for types, row in zip(inputs["mm_token_type_ids"], starts)]


def greys(inputs, processor):
    """The grey of the first frame of each pair, 0 to 255."""
    vp = processor.video_processor
    red = inputs["pixel_values_videos"].view(-1, 3, 2, PATCH, PATCH)[:, 0, 0].flatten(1).mean(1)
    red = (red * vp.image_std[0] + vp.image_mean[0]) * 255
    pairs = [part[0] for t, h, w in inputs["video_grid_thw"].tolist() for part in red[: t * h * w].split(h * w)]
    return [round(value.item()) for value in pairs]


# --- sources -------------------------------------------------------------------------------------------------------


def decoded_sources(folder):
    path = folder / "clip.mp4"
    data = path.read_bytes()
    return {
        "path": str(path),
        "pathlib": path,
        "file URL": path.as_uri(),
        "data URL": "data:video/mp4;base64," + base64.b64encode(data).decode(),
        "bytes": data,
        "file object": io.BytesIO(data),
        "open file": open(path, "rb"),
        "dict": {"video": path},
    }


def test_every_form_of_a_file_gives_the_same_pixels(processor, folder):
    expected = None
    for name, source in decoded_sources(folder).items():
        inputs = processor(text=f"{START}{END}", videos=source, fps=2.5, return_tensors="pt")
        assert inputs["video_grid_thw"].tolist() == [[3, 8, 12]], name
        expected = inputs if expected is None else expected
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"]), name
    # 2 s at 2.5 fps: the frames at 0, 0.4, 0.8, 1.2, 1.6 s are numbers 0, 2, 4, 6, 8; pairs begin with 0, 4, 8
    assert greys(expected, processor) == pytest.approx([0, 80, 160], abs=6)


def test_every_form_of_frames_in_memory_gives_qwens_pixels(processor, frames):
    plain = Qwen2VLVideoProcessor.from_dict(processor.video_processor.to_dict())
    expected = plain([frames], return_tensors="pt")
    channels_first = frames.transpose(0, 3, 1, 2).copy()
    sources = {
        "array": frames,
        "array, channels first": channels_first,
        "tensor": torch.from_numpy(channels_first),
        "list of arrays": list(frames),
        "list of tensors": list(torch.from_numpy(channels_first)),
        "list of PIL images": [Image.fromarray(frame) for frame in frames],
        "tuple of PIL images": tuple(Image.fromarray(frame) for frame in frames),
        "batch of one": frames[None],
        "list of one": [frames],
        "per sample": [[frames]],
        "dict": {"video": frames},
        "dict with the size it has": {"video": frames, "max_pixels": AREA},
    }
    for name, source in sources.items():
        inputs = processor(text=f"{START}{END}", videos=source, return_tensors="pt")
        assert inputs["video_grid_thw"].tolist() == expected["video_grid_thw"].tolist() == [[5, 8, 12]], name
        assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"]), name


def test_decoded_pixels_equal_qwens_of_the_same_frames(processor, folder):
    path, size = folder / "clip.mp4", {"factor": 8, "min_pixels": 64, "max_pixels": AREA}
    frames, metadata = processor.read_frames(path, fps=5, **size)
    assert frames.shape == (10, 3, 32, 48) and frames.dtype == torch.uint8
    expected = Qwen2VLVideoProcessor.from_dict(processor.video_processor.to_dict())([frames], return_tensors="pt")
    inputs = processor(videos=path, fps=5, return_metadata=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert inputs["video_metadata"] == [metadata]
    assert metadata.frames_indices == list(range(10)) and metadata.fps == 5 and metadata.duration == 2


@pytest.mark.parametrize("form", ["folder", "list of paths", "list of pathlib", "list of PIL images"])
def test_folders_and_lists_of_images_are_one_video(processor, folder, form):
    paths = sorted((folder / "stills").iterdir())
    source = {
        "folder": folder / "stills",
        "list of paths": [str(path) for path in paths],
        "list of pathlib": paths,
        "list of PIL images": [Image.open(path) for path in paths],
    }[form]
    for videos in (source, [source]):
        inputs = processor(text=f"{START}{END}", videos=videos, return_tensors="pt")
        assert inputs["video_grid_thw"].tolist() == [[2, 8, 12]]
        assert greys(inputs, processor) == pytest.approx([0, 40], abs=1)


def test_lists_of_files_are_one_video_each(processor, folder, frames):
    clip = folder / "clip.mp4"
    text = f"{START}{END}" * 3
    for videos in ([clip, str(clip), frames], [[clip, str(clip), frames]], [[clip], [], [str(clip), frames]]):
        inputs = processor(text=text, videos=videos, num_frames=2, return_tensors="pt")
        assert inputs["video_grid_thw"].tolist() == [[1, 8, 12], [1, 8, 12], [5, 8, 12]]
        assert marks(inputs, processor) == [[2, 2, 2]]


def test_a_url_is_refused_with_the_remedy(processor):
    with pytest.raises(VideoReadError, match="allow_urls=True"):
        chat(processor, say({"type": "video", "video": "https://example.com/clip.mp4"}))
    with pytest.raises(VideoReadError) as error:  # allowed: the reader tries, and fails at the closed port
        processor(videos="http://127.0.0.1:9/clip.mp4", allow_urls=True)
    assert "allow_urls" not in str(error.value)


@pytest.mark.parametrize("bad", ["/nowhere.mp4", b"no video", b"", 7])
def test_bad_videos_are_one_clear_line(processor, bad):
    with pytest.raises(VideoReadError) as error:
        processor(text=f"{START}{END}", videos=bad)
    assert "\n" not in str(error.value)


# --- sampling and sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "call", "pairs"),
    [
        ({}, {}, 1),  # 2 s at 1 fps
        ({}, {"fps": 2}, 2),
        ({}, {"fps": 5.0}, 5),
        ({}, {"num_frames": 6}, 3),
        ({}, {"num_frames": 6, "fps": 1}, 3),
        ({}, {"num_frames": 2, "fps": None}, 1),
        ({}, {"videos_kwargs": {"num_frames": 8}}, 4),
        ({}, {"do_sample_frames": False}, 5),
        ({}, {"do_sample_frames": False, "fps": 1}, 5),
        ({}, {"do_sample_frames": True}, 1),
        ({"fps": 5}, {"num_frames": 2}, 5),
        ({"num_frames": 8}, {"fps": 1}, 4),
        ({"nframes": 8}, {}, 4),
        ({"fps": 5, "num_frames": 4}, {}, 2),
        ({"fps": 5, "do_sample_frames": None}, {"do_sample_frames": False}, 5),
        ({"fps": 5, "start": 1.0}, {}, 3),
        ({"fps": 5, "video_start": 0.4, "video_end": 1.2}, {}, 2),
        ({}, {"fps": 5, "start": 1.0, "end": 1.4}, 1),
        ({}, {"videos_kwargs": {"fps": 5, "end": 0.8}}, 2),
    ],
)
def test_sampling(processor, folder, item, call, pairs):
    block = {"type": "video", "video": str(folder / "clip.mp4"), **item}
    inputs = chat(processor, say(block), processor_kwargs=call)
    assert inputs["video_grid_thw"].tolist() == [[pairs, 8, 12]]


def test_arrays_are_sampled_on_request(processor, frames):
    inputs = processor(videos=frames, num_frames=4, fps=1, do_sample_frames=True)
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 12]]
    assert greys(inputs, processor) == pytest.approx([0, 100], abs=1)  # frames 0, 2, 5, 7
    assert processor(videos=frames, num_frames=4)["video_grid_thw"].tolist() == [[5, 8, 12]]
    assert processor(videos={"video": frames, "num_frames": 4})["video_grid_thw"].tolist() == [[2, 8, 12]]


def test_default_sampling_is_the_video_processors(processor, folder):
    sampled = copy.deepcopy(processor)
    sampled.video_processor.fps = 5
    assert sampled(videos=folder / "clip.mp4")["video_grid_thw"].tolist() == [[5, 8, 12]]
    sampled.video_processor.num_frames = 4
    assert sampled(videos=folder / "clip.mp4")["video_grid_thw"].tolist() == [[2, 8, 12]]
    assert sampled(videos=folder / "clip.mp4", fps=1)["video_grid_thw"].tolist() == [[1, 8, 12]]


def test_sampling_keywords_of_transformers_serve(processor, folder):
    # `transformers serve` passes num_frames in place of a keyword of the template
    inputs = chat(processor, say({"type": "video", "url": str(folder / "clip.mp4")}), num_frames=4)
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 12]]


def test_frames_keep_their_own_rate(processor, frames):
    pictures = [Image.fromarray(frame) for frame in frames[:6]]
    for item in ({"fps": 2.0}, {"sample_fps": 4.0}, {}):
        inputs = chat(processor, say({"type": "video", "video": pictures, **item}))
        assert inputs["video_grid_thw"].tolist() == [[3, 8, 12]]
    inputs = chat(processor, say({"type": "video", "video": pictures, "num_frames": 2}))
    assert inputs["video_grid_thw"].tolist() == [[1, 8, 12]]
    with pytest.raises(ValueError, match="Sampling frames from a list of images"):
        processor(videos=["a.png", "b.png"], do_sample_frames=True)


@pytest.mark.parametrize("kind", ["file", "array"])
@pytest.mark.parametrize(
    ("item", "call", "grid"),
    [
        ({"max_pixels": 16 * 24}, {}, [4, 6]),
        ({"min_pixels": 64 * 96, "max_pixels": 64 * 96}, {}, [16, 24]),
        ({"resized_height": 16, "resized_width": 16}, {}, [4, 4]),
        ({}, {"max_pixels": 16 * 24}, [4, 6]),
        ({}, {"size": {"shortest_edge": 64, "longest_edge": 16 * 24}}, [4, 6]),
        ({}, {"videos_kwargs": {"max_pixels": 16 * 24}}, [4, 6]),
        ({"max_pixels": 32 * 48}, {"max_pixels": 16 * 24}, [8, 12]),
        ({"total_pixels": 5 * 16 * 24}, {}, [4, 6]),
        ({}, {"total_pixels": 5 * 16 * 24}, [4, 6]),
    ],
)
def test_sizes_of_frames(processor, folder, frames, kind, item, call, grid, recwarn):
    source = folder / "clip.mp4" if kind == "file" else frames
    call = call if kind == "array" else {"fps": 5} | call
    inputs = processor(text=f"{START}{END}", videos=[{"video": source, **item}], return_tensors="pt", **call)
    assert inputs["video_grid_thw"].tolist() == [[5, *grid]]
    assert len(inputs["pixel_values_videos"]) == 5 * grid[0] * grid[1]
    assert not [warning for warning in recwarn if "deprecated" in str(warning.message)]


@pytest.mark.parametrize("kind", ["file", "array"])
def test_cap_pixels_per_frame(processor, folder, frames, kind):
    capped = copy.deepcopy(processor)
    capped.video_processor.max_video_tokens = 34  # 0.9 * 34 tokens of 8 x 8 pixels over 5 pairs: 391 pixels a frame
    source = folder / "clip.mp4" if kind == "file" else frames
    call = {"fps": 5} if kind == "file" else {}
    assert capped(videos=source, **call)["video_grid_thw"].tolist() == [[5, 8, 12]]
    assert capped(videos=source, cap_pixels_per_frame=True, **call)["video_grid_thw"].tolist() == [[5, 4, 6]]
    capped.video_processor.cap_pixels_per_frame = True
    assert capped(videos=source, **call)["video_grid_thw"].tolist() == [[5, 4, 6]]
    assert capped(videos=source, cap_pixels_per_frame=False, **call)["video_grid_thw"].tolist() == [[5, 8, 12]]


def test_sizes_of_images(processor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    plain = processor.image_processor
    one = {"image": picture, "max_pixels": 16 * 24}
    wide = {"image": np.asarray(picture), "resized_height": 16, "resized_width": 80}
    inputs = processor(text=f"{START}{END}" * 3, images=[one, picture, wide], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 8, 12], [1, 4, 20]]
    small = plain(picture, size={"shortest_edge": 64, "longest_edge": 16 * 24}, return_tensors="pt")
    exact = plain(picture.resize((80, 16)), do_resize=False, return_tensors="pt")
    expected = [small["pixel_values"], plain(picture, return_tensors="pt")["pixel_values"], exact["pixel_values"]]
    assert torch.equal(inputs["pixel_values"], torch.cat(expected))


@pytest.mark.parametrize("form", ["path", "pathlib", "bytes", "file", "PIL", "array", "tensor", "data URL", "nested"])
def test_every_form_of_an_image(processor, folder, form):
    path = folder / "stills" / "3.png"
    picture = Image.open(path)
    source = {
        "path": str(path),
        "pathlib": path,
        "bytes": path.read_bytes(),
        "file": io.BytesIO(path.read_bytes()),
        "PIL": picture,
        "array": np.asarray(picture),
        "tensor": torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()),
        "data URL": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        "nested": [[picture]],
    }[form]
    expected = processor.image_processor(picture, return_tensors="pt")
    inputs = processor(text=f"{START}{IMAGE}{END}", images=source, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert marks(inputs, processor) == [[1]]


def test_a_damaged_image_is_one_clear_line(processor, shared):
    """torchvision's decoder ended the process at this one."""
    with pytest.raises(ValueError, match="damaged_crc.png: cannot be read as an image"):
        chat(processor, say({"type": "image", "image": str(shared / "repro" / "damaged_crc.png")}))


@pytest.mark.parametrize(
    "bad",
    [5, True, [1], {}, {"a": 1}, 2.5, "", "/nowhere.png", b"", np.zeros((0, 4, 3)), np.array([[[None] * 3] * 3])],
    ids=repr,
)
def test_what_is_no_image_is_a_value_error(processor, bad):
    with pytest.raises(ValueError) as error:
        chat(processor, say({"type": "image", "image": bad}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_only_the_caller_can_allow_urls(processor, kind):
    url, closed = "http://127.0.0.1:9/a", "cannot be (read|opened) as .*[Cc]onnection refused"
    wrapped = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    for item in ({"type": kind, kind: url}, wrapped, {"type": kind, "url": url}, {"type": kind, kind: {"url": url}}):
        with pytest.raises(ValueError, match="pass allow_urls=True"):
            chat(processor, say(item))
        with pytest.raises(ValueError, match=closed):
            processor.apply_chat_template(
                [say(item)], tokenize=True, return_dict=True, processor_kwargs={"allow_urls": True}
            )
        source = next(value for key, value in item.items() if key != "type")
        for host in ({**item, "allow_urls": True}, {"type": kind, kind: {"url": url, "allow_urls": True}}):
            with pytest.raises(ValueError, match="'allow_urls' is unknown"):
                chat(processor, say(host))
        with pytest.raises(ValueError, match=closed):
            processor(**{f"{kind}s": source if isinstance(source, str) else source["url"]}, allow_urls=True)


@pytest.mark.parametrize(
    "options",
    [
        {"min_pixels": "100"}, {"max_pixels": "100"}, {"min_pixels": 1e300}, {"max_pixels": -5}, {"resized_height": 28},
        {"resized_height": "28", "resized_width": "28"}, {"resized_height": 10**9, "resized_width": 10**9},
        {"min_pixels": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["image", "video"])
def test_options_out_of_bounds_are_named(processor, folder, kind, options):
    source = folder / {"image": "stills/0.png", "video": "clip.mp4"}[kind]
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        chat(processor, say({"type": kind, kind: source, **options}))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError):
        processor(**{f"{kind}s": source}, **{f"{kind}s_kwargs": options})


# --- qwen-vl-utils -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_metadata", [True, False])
def test_output_of_qwen_vl_utils(processor, folder, frames, with_metadata, monkeypatch):
    from qwen_vl_utils import process_vision_info

    block = {"type": "video", "video": [Image.fromarray(f) for f in frames], "min_pixels": 64, "max_pixels": AREA}
    messages = say({"type": "image", "image": str(folder / "stills" / "1.png")}, block)
    images, videos, kwargs = process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=with_metadata, image_patch_size=PATCH
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=images, videos=videos, return_tensors="pt", return_metadata=True, **kwargs)
    assert inputs["video_grid_thw"].tolist() == [[5, 8, 12]]
    tensor = videos[0][0] if with_metadata else videos[0]
    expected = processor.video_processor([tensor], do_resize=False, return_tensors="pt")
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert marks(inputs, processor) == [[1, 2]]
    assert inputs["video_metadata"][0].fps == (2.0 if with_metadata else None)


def test_qwen_vl_utils_reads_files_with_our_reader(processor, folder, monkeypatch):
    """As the guide says; its own readers need packages that are not installed, or an old torchvision."""
    from qwen_vl_utils import process_vision_info, vision_process
    from torchvision import io

    path = str(folder / "clip.mp4")
    sizes = {"min_pixels": 64, "max_pixels": AREA}
    for options, pairs in (({"fps": 2.5}, 3), ({"nframes": 4}, 2), ({"video_start": 1.0, "fps": 5.0}, 3)):
        messages = say({"type": "video", "video": path, **sizes, **options})
        if not options.keys() - {"fps"} and not hasattr(io, "read_video"):
            with pytest.raises(Exception, match="read_video|decord|torchcodec"):
                process_vision_info(messages)
        with monkeypatch.context() as patch:
            patch.setattr(vision_process, "VIDEO_READER_BACKENDS", dict(vision_process.VIDEO_READER_BACKENDS))
            patch.setattr(vision_process, "FORCE_QWENVL_VIDEO_READER", None)
            vamba.register_with_qwen_vl_utils()
            images, videos, kwargs = process_vision_info(
                messages, return_video_kwargs=True, return_video_metadata=True, image_patch_size=PATCH
            )
        vision_process.get_video_reader_backend.cache_clear()
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=images, videos=videos, return_tensors="pt", **kwargs)
        assert inputs["video_grid_thw"].tolist() == [[pairs, 8, 12]]
        mine = chat(processor, messages)
        assert mine["video_grid_thw"].tolist() == inputs["video_grid_thw"].tolist()
        difference = (inputs["pixel_values_videos"] - mine["pixel_values_videos"]).abs()
        assert difference.max() < 0.1  # one is resized by torchvision


def test_the_rate_told_to_qwen_vl_utils_is_that_of_the_frames(folder):
    from vamba.video.qwen_vl_utils_reader import _read

    path = str(folder / "clip.mp4")
    for options in (
        {"fps": 2.0}, {"fps": None}, {"fps": 100}, {"nframes": 4, "video_start": 0.0, "video_end": 1.0},
        {"nframes": 4}, {"fps": 2.0, "max_frames": 3}, {"nframes": 4, "fps": None},
    ):  # fmt: skip
        frames, metadata, rate = _read({"video": path, **options})
        indices = metadata["frames_indices"]
        assert len(frames) == len(indices) > 1
        assert rate == pytest.approx((len(frames) - 1) * metadata["fps"] / (indices[-1] - indices[0]), rel=1e-3)
        if options.keys() == {"fps"}:  # None is qwen-vl-utils' own default, and no frame is given twice
            assert rate == pytest.approx(min(options["fps"] or 2.0, metadata["fps"]), rel=0.1)


def test_metadata_goes_with_its_video(processor, frames):
    metadata = [VideoMetadata(total_num_frames=10, fps=5.0), {"total_num_frames": 10, "fps": 10.0}]
    given = [[frames], [frames]]
    for entries in (metadata, [[entry] for entry in metadata]):
        inputs = processor(
            text=[f"{START}{END}"] * 2, videos=given, video_metadata=copy.deepcopy(entries), fps=2.5,
            do_sample_frames=True, return_metadata=True, return_tensors="pt",
        )  # fmt: skip
        assert [entry.fps for entry in inputs["video_metadata"]] == [5.0, 10.0]
        assert inputs["video_grid_thw"][:, 0].tolist() == [2, 2]  # 5 frames, rounded down; 2.5, at least 4
    with pytest.raises(ValueError, match="video_metadata has 1 entries for 2 videos"):
        processor(text=[f"{START}{END}"] * 2, videos=given, video_metadata=metadata[:1])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "image": "PATH"},
        {"type": "image", "url": "PATH"},
        {"type": "image", "path": "PATH"},
        {"type": "image_url", "image_url": {"url": "PATH"}},
        {"image_url": "PATH"},
        {"type": "image_url", "image_url": "PATH"},
        {"image": "PATH", "video": None},
    ],
)
def test_names_of_an_image_in_a_message(processor, folder, block):
    path = str(folder / "stills" / "2.png")

    def fill(value):
        return {key: fill(inner) for key, inner in value.items()} if isinstance(value, dict) else path_or(value)

    def path_or(value):
        return path if value == "PATH" else value

    inputs = chat(processor, say(fill(block)))
    assert torch.equal(inputs["pixel_values"], processor.image_processor(Image.open(path))["pixel_values"])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "video_url", "video_url": {"url": "PATH"}, "fps": 2.5},
        {"type": "video_url", "video_url": {"url": "PATH", "fps": 2.5}},
        {"type": "video_url", "video_url": "PATH", "fps": 2.5},
        {"video_url": "PATH", "fps": 2.5, "image": None},
    ],
)
def test_names_of_a_video_in_a_message(processor, folder, block):
    path = str(folder / "clip.mp4")
    inner = block["video_url"]
    block = block | {"video_url": path if inner == "PATH" else {**inner, "url": path}}
    expected = chat(processor, say({"type": "video", "video": path, "fps": 2.5}))
    inputs = chat(processor, say(block))
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist() and marks(inputs, processor) == [[2]]
    text = processor.apply_chat_template(say(block), add_generation_prompt=True)
    assert text.count(START) == 1


def test_nothing_in_a_message_is_dropped_silently(processor, folder):
    path = str(folder / "clip.mp4")
    for tokenize in (True, False):
        for item in ({"type": "video", "video": path, "fpss": 2}, {"type": "video_url", "video_url": path, "fpss": 2}):
            with pytest.raises(
                ValueError, match="'fpss' is unknown in an item of type video; known keys are video, url.* fps,"
            ):
                processor.apply_chat_template(say(item), tokenize=tokenize)
        with pytest.raises(ValueError, match="'fps' is unknown in an item of type image"):
            processor.apply_chat_template(say({"type": "image", "image": path, "fps": 1}), tokenize=tokenize)
        with pytest.raises(ValueError, match="'videoo' is unknown in an item of type text; known keys are text, type"):
            processor.apply_chat_template(say({"type": "text", "text": "a", "videoo": path}), tokenize=tokenize)
        with pytest.raises(ValueError, match="'type': 'audio'.*give a text, an image or a video"):
            processor.apply_chat_template(say({"type": "audio", "audio": path}), tokenize=tokenize)
    with pytest.raises(ValueError, match="'fpss' is unknown"):
        processor(text=f"{START}{END}", videos=[{"video": path, "fpss": 2}])


@pytest.mark.parametrize(("options", "pairs"), [({"max_frames": 4}, 2), ({"min_frames": 8}, 4), ({"raw_fps": 5}, 3)])
def test_the_bounds_of_qwen_vl_utils_on_the_number_of_frames(processor, folder, options, pairs):
    inputs = chat(processor, say({"type": "video", "video": str(folder / "clip.mp4"), "fps": 2.5, **options}))
    assert inputs["video_grid_thw"][0, 0] == pairs


def test_messages_are_not_changed(processor, folder):
    block = {"type": "video", "video": str(folder / "clip.mp4"), "nframes": 4, "max_pixels": 16 * 24}
    messages = say(block, {"type": "image_url", "image_url": {"url": str(folder / "stills" / "0.png")}})
    before, options = copy.deepcopy(messages), {"videos_kwargs": {"max_pixels": AREA}}
    chat(processor, messages, processor_kwargs=options)
    assert messages == before and options["videos_kwargs"] == {"max_pixels": AREA}
    item = {"video": str(folder / "clip.mp4"), "nframes": 4}
    processor(videos=[item])
    assert item == {"video": str(folder / "clip.mp4"), "nframes": 4}


# --- text and media together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BARE_TEMPLATE], ids=["placeholders", "bare"])
def test_no_placeholder_reaches_the_ids(processor, folder, template):
    messages = say(
        {"type": "video", "video": str(folder / "clip.mp4")}, {"type": "image", "image": np.zeros((8, 8, 3))}
    )
    inputs = chat(processor, messages, chat_template=template)
    text = processor.decode(inputs["input_ids"][0])
    assert text.count(START + END) == 2 and IMAGE not in text and VIDEO not in text
    assert marks(inputs, processor) == [[2, 1]]


@pytest.mark.parametrize("mark", [START + END, START + IMAGE + END, START + IMAGE * 7 + END, IMAGE])
def test_marks_of_older_prompts(processor, mark):
    inputs = processor(text=f"a {mark} b", images=np.zeros((8, 8, 3), np.uint8))
    assert processor.decode(inputs["input_ids"][0]) == f"a {START}{END} b"
    assert sum(inputs["mm_token_type_ids"][0]) == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_different_media(processor, frames, side):
    picture = np.full((8, 8, 3), 9, np.uint8)
    image, video = {"type": "image", "image": picture}, {"type": "video", "video": frames[:2]}
    messages = [say(video, image, video), say(), say(image), say(image, video)]
    inputs = chat(processor, messages, processor_kwargs={"padding": True, "padding_side": side})
    assert marks(inputs, processor) == [[2, 1, 2], [], [1], [1, 2]]
    assert len(inputs["image_grid_thw"]) == 3 and len(inputs["video_grid_thw"]) == 3
    for row, single in enumerate(messages):
        alone = chat(processor, single)
        kept = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][kept].tolist() == alone["input_ids"][0].tolist()
        assert inputs["mm_token_type_ids"][row][kept].tolist() == alone["mm_token_type_ids"][0].tolist()
        assert kept[-1 if side == "left" else 0]


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_return_tensors(processor, folder, kind):
    options = {} if kind is None else {"return_tensors": kind}
    inputs = processor(
        text=[f"{START}{END}"] * 2, images=[folder / "stills" / "0.png"], videos=[folder / "clip.mp4"],
        media_kinds=["video", "image"], **options,
    )  # fmt: skip
    rows = inputs["mm_token_type_ids"]
    assert [list(map(int, row)) for row in rows] == [[2, 0], [1, 0]]
    expected = {None: list, "pt": torch.Tensor, "np": np.ndarray}[kind]
    assert isinstance(inputs["input_ids"], expected) and isinstance(rows, expected)
    if kind is not None:
        assert all(isinstance(value, expected) for value in inputs.values())


def test_an_item_without_a_source_stands_for_the_memorys(processor, frames):
    inputs = chat(processor, say({"type": "video"}))
    assert marks(inputs, processor) == [[2]] and "pixel_values_videos" not in inputs
    inputs = chat(processor, say({"type": "video"}, {"type": "video", "video": frames}))
    assert marks(inputs, processor) == [[2, 2]] and len(inputs["video_grid_thw"]) == 1
    with pytest.raises(ValueError, match="names no source under video, url, path"):
        chat(processor, say({"type": "video", "fps": 2.0}))


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ([f"{START}{END}"] * 2, 1, 0, "found 2 tokens, 1 images and 0 videos"),
        (["a", f"{START}{END}"], 1, 1, "found 1 tokens, 1 images and 1 videos"),
        (f"{START}{END}", 0, 0, "found 1 tokens, 0 images and 0 videos"),
        (f"{START}{END}", 2, 0, "found 1 tokens, 2 images and 0 videos"),
        ([START + IMAGE + END] * 2, 1, 1, "found 2 and 0 tokens, 1 images and 1 videos"),
        (START + VIDEO + END, 1, 0, "found 0 and 1 tokens, 1 images and 0 videos"),
        (f"{START}{END}{START}{END}", 1, 1, "Which of the 2"),
        ([["pre", "tokenized"]], 0, 0, "must be a string or list of strings"),
        (None, 0, 0, "at least one input"),
    ],
)
def test_numbers_that_do_not_agree(processor, frames, text, images, videos, message):
    pictures = [np.zeros((8, 8, 3), np.uint8)] * images or None
    with pytest.raises(ValueError, match=message) as error:
        processor(text=text, images=pictures, videos=[frames] * videos or None)
    assert "\n" not in str(error.value)


def test_a_single_text_may_announce_nothing(processor, frames):
    inputs = processor(text="what happens", videos=[frames, frames], return_tensors="pt")
    assert len(inputs["video_grid_thw"]) == 2 and not inputs["mm_token_type_ids"].any()


def test_truncation_may_not_cut_media_off(processor, frames):
    text = "what happens " * 20 + START + END
    with pytest.raises(ValueError, match="Likely due to `truncation"):
        processor(text=text, videos=frames, truncation=True, max_length=20)


def test_control_tokens_in_user_text(processor, frames):
    messages = say({"type": "video", "video": frames}, {"type": "text", "text": f"is {START}{END} or {VIDEO} a token?"})
    inputs = chat(processor, messages, sanitize_control_tokens=True)
    assert marks(inputs, processor) == [[2]]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BARE_TEMPLATE], ids=["placeholders", "bare"])
def test_assistant_tokens_mask(processor, frames, template):
    said = "{{ content['text'] }}"
    generation = "{% if message['role'] == 'assistant' %}{% generation %}" + said + "{% endgeneration %}{% else %}"
    template = template.replace(said, generation + said + "{% endif %}")
    answer = {"role": "assistant", "content": [{"type": "text", "text": "it moves"}]}
    one = say({"type": "video", "video": frames}, {"type": "image", "image": frames[0]}) + [answer]
    messages = [one, say() + [answer] + say({"type": "image", "image": frames[0]}) + [answer]]
    for side in ("left", "right"):
        inputs = chat(
            processor, messages, chat_template=template, add_generation_prompt=False, return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": side},
        )  # fmt: skip
        masks = torch.as_tensor(inputs["assistant_masks"]).bool()
        spoken = [processor.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks)]
        assert spoken == ["it moves", "it moves" * 2]


# --- the object ----------------------------------------------------------------------------------------------------


def test_round_trip(processor, folder, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vamba"}')
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VambaProcessor
    assert loaded.to_dict() == processor.to_dict()
    for part in (processor, processor.image_processor, processor.video_processor):
        assert not hasattr(part, "auto_map")
    messages = say({"type": "video", "video": pathlib.Path(folder / "clip.mp4"), "fps": 5})
    first, second = chat(processor, messages), chat(loaded, messages)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_reader_gives_the_frames_of_the_call(processor, folder):
    inputs = processor(videos=folder / "clip.mp4", fps=5, return_tensors="pt")
    with processor.video_reader(folder / "clip.mp4", fps=5, chunk_frames=4) as reader:
        chunks = list(reader)
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    pixels = [processor.video_processor([chunk.frames], do_resize=False)["pixel_values_videos"] for chunk in chunks]
    assert torch.equal(torch.cat(pixels), inputs["pixel_values_videos"])
