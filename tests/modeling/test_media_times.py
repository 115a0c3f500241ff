"""When what a memory holds was seen: the same through chunks, forks, batches, packing, generation and files."""

import pytest
import torch

from vamba.modeling import StateMemory, VideoMemory
from vamba.modeling.memory_files import read_memory, write_memory

import tiny_video_ma2mba
from tiny_vamba import media, prompt


NAN = float("nan")
SPANS = torch.tensor([[0.0, 0.5], [0.5, 1.75], [1.75, 2.0], [2.0, 3.0], [7.0, 8.5]], dtype=torch.float64)


@pytest.fixture(scope="module")
def ma2mba():
    return tiny_video_ma2mba.tiny_model()


def same(actual, expected) -> bool:
    return actual.dtype == torch.float64 and torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))


def per_token(*parts) -> torch.Tensor:
    """Spans repeated for each of their tokens; None for a span that is unknown."""
    spans = [torch.full((1, 2), NAN, dtype=torch.float64) if span is None else span for span, _ in parts]
    return torch.cat([span.repeat_interleave(tokens, 0) for span, (_, tokens) in zip(spans, parts)])


@pytest.mark.parametrize("chunk_frames", [1, 4, None])
def test_however_a_video_is_cut(model, ma2mba, chunk_frames):
    pixels, grid = media((5, 4, 6))
    memory = model.encode_video(pixels, grid, chunk_frames=chunk_frames, video_times=SPANS)
    assert same(memory.times[0][0], SPANS) and same(memory.token_times(), per_token((SPANS, 6)))
    memory = model.encode_video(pixels[:48], torch.tensor([[2, 4, 6]]), video_times=SPANS[:2])
    model.encode_video(pixels[48:], torch.tensor([[3, 4, 6]]), memory=memory, video_times=SPANS[2:])
    assert len(memory.times[0]) == 1 and same(memory.times[0][0], SPANS)
    state = ma2mba.encode_video(**tiny_video_ma2mba.video(5), chunk_frames=chunk_frames, video_times=SPANS)
    assert same(state.times[0][0], SPANS) and same(state.token_times(), per_token((SPANS, 4)))


def test_several_videos_and_frames_of_which_nothing_is_known(model):
    """Each video counts by its own clock; frames without times are unknown and disturb nothing."""
    memory = model.encode_video(*media((2, 4, 4), (3, 8, 4)), video_times=torch.cat([SPANS[3:], SPANS[:3]]))
    assert same(memory.token_times(), per_token((SPANS[3:], 4), (SPANS[:3], 8)))
    model.encode_video(*media((1, 8, 4)), memory=memory)
    assert same(memory.token_times(), per_token((SPANS[3:], 4), (SPANS[:3], 8), (None, 8)))
    model.encode_video(*media((1, 8, 4)), memory=memory, video_times=SPANS[3:4])
    assert same(memory.times[0][1], torch.cat([SPANS[:3], torch.full((1, 2), NAN), SPANS[3:4]]))


def test_rows_of_a_batch_and_images(model, ma2mba):
    """Padding and images are at no time; a row that is selected takes its times along."""
    pixels, grid = media((1, 4, 4), (3, 4, 4))
    image, image_grid = media((1, 4, 8))
    text = torch.cat([prompt(4, 1), torch.cat([prompt(0, 2), prompt(2)], 1)])
    types = torch.tensor([[2, 0, 0, 0, 0, 0], [1, 0, 2, 0, 0, 0]])
    given = {"pixel_values_videos": pixels, "video_grid_thw": grid, "pixel_values": image, "image_grid_thw": image_grid}
    output = model(text, **given, mm_token_type_ids=types, video_times=SPANS[:4], use_cache=True)
    memory = output.past_key_values
    assert same(memory.token_times(0), per_token((SPANS[:1], 4), *[(None, 1)] * 16))
    assert same(memory.token_times(1), per_token((None, 8), (SPANS[1:4], 4)))
    memory.batch_select_indices(torch.tensor([1]))
    assert memory.video_rows == [1]  # the rows of video stay, and text finds its own there
    state = ma2mba.encode_video(**tiny_video_ma2mba.video(1, 2), rows=[0, 1], video_times=SPANS[:3])
    state.batch_repeat_interleave(2)
    state.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert [len(state.token_times(row)) for row in range(4)] == [8, 4, 4, 8]
    assert same(state.token_times(0), per_token((SPANS[1:3], 4)))


def test_generating_packed_and_watched_text(model, ma2mba):
    pixels, grid = media((2, 4, 4), (1, 4, 4))
    videos = {"pixel_values_videos": pixels, "video_grid_thw": grid, "video_times": SPANS[:3]}
    both = torch.cat([prompt(3, 1), prompt(3, 1)], 1)
    packed, plain = model(both, **videos, packed_lengths=[5, 5]), model(both, **videos | {"video_times": None})
    assert packed.logits.shape == plain.logits.shape
    options = {"max_new_tokens": 2, "num_beams": 2, "return_dict_in_generate": True}
    memory = model.generate(prompt(3, 2), **videos, **options).past_key_values
    assert same(memory.token_times(), per_token((SPANS[:3], 4)))
    options |= tiny_video_ma2mba.video(3) | {"video_times": SPANS[:3]}
    state = ma2mba.generate(tiny_video_ma2mba.prompt(3, 1), **options).past_key_values
    assert [same(times[0], SPANS[:3]) for times in state.times] == [True, True]


@pytest.mark.parametrize("kind", ["vamba", "video-ma2mba"])
def test_forks_errors_and_files_keep_them(model, ma2mba, tmp_path, kind):
    if kind == "vamba":
        pixels, grid = media((2, 4, 4))
        first, more = (pixels, grid), {"pixel_values_videos": pixels, "video_grid_thw": grid}
        asked, loaded = model, VideoMemory
    else:
        first, more, asked, loaded = (), tiny_video_ma2mba.video(2), ma2mba, StateMemory
    memory = asked.encode_video(*first, **({} if first else more), video_times=SPANS[:2])
    fork = memory.fork()
    asked.encode_video(**more, memory=fork, video_times=SPANS[2:4])
    assert same(memory.times[0][0], SPANS[:2]) and same(fork.times[0][0], SPANS[:4])
    with pytest.raises(ValueError, match="one temporal patch after the other"):  # a clock that runs backwards
        asked.encode_video(**more, memory=fork, video_times=SPANS[:2])
    assert same(fork.times[0][0], SPANS[:4])
    fork.to("cpu").save(tmp_path / "m")
    assert same(loaded.load(tmp_path / "m").token_times(), fork.token_times())
    form = {"vamba": "vamba.video_memory.1", "video-ma2mba": "vamba.state_memory.1"}[kind]
    tensors, header = read_memory(tmp_path / "m", form)
    for wrong in (SPANS[:3], SPANS[:4].float(), SPANS[:4].flip(0), SPANS[:4].flip(1), SPANS[:4] * torch.inf, SPANS[0]):
        write_memory(tmp_path / "wrong", form, tensors | {"video.times": wrong}, header)
        with pytest.raises(ValueError, match="video.times"):
            loaded.load(tmp_path / "wrong")
    mixed = SPANS[:4].clone()
    mixed[1, 1] = NAN
    write_memory(tmp_path / "wrong", form, tensors | {"video.times": mixed}, header)
    with pytest.raises(ValueError, match="video.times"):
        loaded.load(tmp_path / "wrong")
    del tensors["video.times"]  # as files had none before
    write_memory(tmp_path / "earlier", form, tensors, header)
    assert loaded.load(tmp_path / "earlier").times[0][0].isnan().all()


def test_times_that_are_none(model):
    pixels, grid = media((2, 4, 4))
    other_shapes = SPANS[:3], SPANS[:2].long(), [[0, 1], [1, 2]], SPANS[:2, 0]
    for wrong in (*other_shapes, SPANS[:2].flip(0), SPANS[:2] - torch.inf):
        with pytest.raises(ValueError, match="video_times"):
            model.encode_video(pixels, grid, video_times=wrong)


def test_a_clock_that_starts_anew_goes_on(model):
    """Of one video in two parts: by the clock of the first, unless the second's is later."""
    memory = model.encode_video(*media((2, 4, 4)), video_times=SPANS[:2])
    for later, expected in ((SPANS[:1], [[1.75, 2.25]]), (SPANS[4:], [[7.0, 8.5]])):
        fork = memory.fork()
        model.encode_video(*media((1, 4, 4)), memory=fork)
        fork.note_times(later)
        assert fork.times[0][0].tolist() == SPANS[:2].tolist() + expected
