"""The processor of Video-Ma2mba: tokens, chat, and squares; what it shares with Vamba's is tested there."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, GPTNeoXTokenizer

from vamba.demo.tiny_checkpoints import tiny_neox_tokenizer
from vamba.modeling import VideoMa2mbaConfig, VideoMa2mbaProcessor

from tiny_video_ma2mba import PATCHES, tiny_config


SIDE = 16


@pytest.fixture
def processor():
    return VideoMa2mbaProcessor.for_model(tiny_config(), tiny_neox_tokenizer(["What happens in the video?"]))


def frames(count: int, height=40, width=64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def chat(processor, content, **options):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"} | options
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, **options)


def test_tokens_are_added_after_the_tokenizers_own():
    tokenizer = tiny_neox_tokenizer(["What?"])
    assert isinstance(tokenizer, GPTNeoXTokenizer)
    own = len(tokenizer)
    processor = VideoMa2mbaProcessor.for_model(tiny_config(), tokenizer)
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(own, own + 6)) and len(tokenizer) == own + 6
    VideoMa2mbaProcessor.for_model(tiny_config(), tokenizer)
    assert len(tokenizer) == own + 6  # once
    ids = tokenizer("<|vision_start|><|vision_end|>What?<|im_end|>").input_ids
    assert ids[:2] == [own, own + 1] and tokenizer.decode(ids, skip_special_tokens=True) == "What?"
    assert processor.vision_start_token_id == own


def test_ids_of_the_default_configuration_are_those_after_gpt_neoxs():
    config = VideoMa2mbaConfig()
    names = ("vision_start", "vision_end", "image", "video")
    assert [getattr(config, f"{name}_token_id") for name in names] == [50277, 50278, 50279, 50280]
    assert 50277 + 6 <= config.text_config.vocab_size


def test_leading_media_come_before_the_first_word(processor):
    video, image, text = {"type": "video"}, {"type": "image"}, {"type": "text", "text": "Hi"}
    mark = "<|vision_start|><|vision_end|>"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    for content, expected in (
        ([video, text], f"{mark}<|im_start|>user\nHi{end}"),
        ([video, image, text, video, text], f"{mark}{mark}<|im_start|>user\nHi{mark}Hi{end}"),
        ([text, image], f"<|im_start|>user\nHi{mark}{end}"),
        ([image], f"{mark}<|im_start|>user\n{end}"),
        ("Hi", f"<|im_start|>user\nHi{end}"),
    ):
        assert chat(processor, content, tokenize=False) == expected
    messages = [{"role": "user", "content": [video, text]}, {"role": "assistant", "content": "Yes"}]
    assert processor.apply_chat_template(messages) == (
        f"{mark}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )


def test_interleaved_media_keep_their_kinds(processor):
    picture = np.zeros((30, 50, 3), np.uint8)
    content = [
        {"type": "video", "video": frames(3)}, {"type": "text", "text": "and"}, {"type": "image", "image": picture},
        {"type": "text", "text": "and"}, {"type": "video", "video": frames(2)},
    ]  # fmt: skip
    inputs = chat(processor, content)
    starts = inputs["input_ids"] == processor.vision_start_token_id
    assert inputs["mm_token_type_ids"][starts].tolist() == [2, 1, 2]
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 4], [2, 4, 4]]
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert inputs["pixel_values_videos"].shape == (5 * PATCHES, 48)


def test_everything_becomes_a_square_of_the_towers_size(processor, clip):
    wide = frames(3, 20, 80)
    sources = {
        "tensor": wide,
        "array": wide.permute(0, 2, 3, 1).numpy(),
        "pictures": [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in wide],
        "file": str(clip),
    }
    for name, source in sources.items():
        inputs = processor(text="<|vision_start|><|vision_end|>", videos=[source], return_tensors="pt")
        count = 2 if name == "file" else 3  # at one frame per second
        assert inputs["video_grid_thw"].tolist() == [[count, 4, 4]], name
    for image in (Image.new("RGB", (90, 30)), torch.zeros(3, 30, 90), np.zeros((30, 90, 3), np.uint8)):
        inputs = processor(text="<|vision_start|><|vision_end|>", images=[image], return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    sized = {"type": "video", "video": str(clip), "fps": 4.0, "max_pixels": 10_000, "min_pixels": 9_000}
    assert chat(processor, [sized])["video_grid_thw"].tolist() == [[8, 4, 4]]


def test_a_wide_picture_is_squeezed_not_cropped(processor):
    picture = np.zeros((16, 48, 3), np.uint8)
    picture[:, :3] = 255  # what is at the edge stays
    inputs = processor(text="<|vision_start|><|vision_end|>", images=[picture], return_tensors="pt")
    first, last = inputs["pixel_values"][0].view(3, 4, 4)[:, :, 0], inputs["pixel_values"][5].view(3, 4, 4)[:, :, 3]
    assert first.mean() > 1 > 0 > last.mean()


def test_chunks_of_a_reader_equal_the_video_at_once(processor, clip):
    at_once = processor(text="<|vision_start|><|vision_end|>", videos=[str(clip)], fps=4.0, return_tensors="pt")
    with processor.video_reader(clip, fps=4.0, chunk_frames=3) as reader:
        chunks = [processor.video_processor([c.frames], do_resize=False, return_tensors="pt") for c in reader]
    assert [len(chunk["pixel_values_videos"]) for chunk in chunks] == [3 * PATCHES, 3 * PATCHES, 2 * PATCHES]
    joined = torch.cat([chunk["pixel_values_videos"] for chunk in chunks])
    torch.testing.assert_close(joined, at_once["pixel_values_videos"])


def test_another_size_is_refused_where_it_is_asked_by_name(processor, clip):
    with pytest.raises(ValueError, match="max_pixels: this model takes frames of 16 x 16 pixels only"):
        processor.video_reader(clip, max_pixels=5000)


def test_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = VideoMa2mbaProcessor.from_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VideoMa2mbaProcessor
    content = [{"type": "video", "video": frames(2)}, {"type": "text", "text": "What happens?"}]
    a, b = chat(processor, content), chat(loaded, content)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
