"""The tiny checkpoints are what transformers takes for published ones."""

import pytest
import torch
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from vamba.demo.tiny_checkpoints import SPECIAL_TOKENS, make_tiny_qwen2_vl, tiny_tokenizer
from vamba.demo.videos import QUESTIONS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny"), QUESTIONS.values())


def test_tiny_checkpoint_is_a_qwen2_vl(checkpoint):
    model, loading = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(processor, Qwen2VLProcessor)
    frames = torch.randint(0, 255, (4, 3, 48, 48), dtype=torch.uint8)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTIONS["first"]}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 6]]
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 2 * 6 * 6 // 4
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert model.generation_config.eos_token_id[0] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tiny_tokenizer_spells_anything_and_knows_its_words():
    tokenizer = tiny_tokenizer(QUESTIONS.values())
    assert len(tokenizer.tokenize(QUESTIONS["first"])) == 5
    for text in ("naïve 视频 🎞️\n\ttabs", QUESTIONS["moment"]):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for token in SPECIAL_TOKENS.values():
        assert len(tokenizer(token).input_ids) == 1
