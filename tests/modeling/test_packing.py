"""Samples packed into one row: loss and every gradient are those of the samples by themselves."""

import pytest
import torch

from tiny_vamba import media, prompt, tiny_model


GRIDS = [[(3, 4, 6)], [], [(2, 4, 4), (5, 4, 6)], [(1, 4, 6)]]  # videos of each sample
LENGTHS = [5, 7, 4, 6]


def samples(dtype=torch.float64):
    """(input_ids, labels, patches, grid) of each sample."""
    made = []
    for index, (grids, length) in enumerate(zip(GRIDS, LENGTHS)):
        ids = prompt(length, items=len(grids), seed=index)
        labels = ids.clone()
        labels[:, : 2 * len(grids) + 1] = -100  # the first always
        patches, grid = (
            media(*grids, seed=index) if grids else (torch.zeros(0, 96), torch.zeros(0, 3, dtype=torch.long))
        )
        made.append((ids, labels, patches.to(dtype), grid))
    return made


def packed_inputs(made):
    ids, labels, patches, grids = zip(*made)
    return {
        "input_ids": torch.cat(ids, 1),
        "labels": torch.cat(labels, 1),
        "packed_lengths": [row.shape[1] for row in ids],
        "pixel_values_videos": torch.cat(patches),
        "video_grid_thw": torch.cat(grids),
    }


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def separately(model, made):
    """Summed loss over the number of all labels, sample by sample."""
    model.zero_grad()
    items = sum((labels[:, 1:] != -100).sum() for _, labels, *_ in made)
    losses, logits = [], []
    for ids, labels, patches, grid in made:
        video = {"pixel_values_videos": patches, "video_grid_thw": grid} if len(grid) else {}
        output = model(input_ids=ids, labels=labels, num_items_in_batch=items, **video)
        output.loss.backward()
        losses.append(output.loss.detach())
        logits.append(output.logits.detach())
    return sum(losses), torch.cat(logits, 1), gradients(model), items


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"cross_attn_use_position_embeddings": True}, {"use_alpha_balancing": False}])
def test_packed_equals_separate(options, attention):
    model, made = tiny_model(**options).double().train(), samples()
    model.set_attn_implementation(attention)
    loss, logits, expected, items = separately(model, made)
    model.zero_grad()
    output = model(**packed_inputs(made), num_items_in_batch=items)
    output.loss.backward()
    torch.testing.assert_close(output.logits, logits, rtol=1e-6, atol=1e-6)  # rotations compute in float32
    torch.testing.assert_close(output.loss, loss, rtol=1e-7, atol=1e-7)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("offload", [False, True])
def test_packed_in_cells(offload):
    model, made = tiny_model().double().train(), samples()
    model.model(
        **{k: v for k, v in packed_inputs(made).items() if k != "labels"}
    ).last_hidden_state.square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.enable_multi_axis_checkpointing(2, 7, offload=offload)
    model.model(
        **{k: v for k, v in packed_inputs(made).items() if k != "labels"}
    ).last_hidden_state.square().sum().backward()
    for name, gradient in gradients(model).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cells", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_a_packed_row(use_reentrant, cells):
    model, made = tiny_model(cross_attn_use_position_embeddings=cells).double().train(), samples()
    model(**packed_inputs(made)).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # as a reentrant checkpoint needs it
    if cells:
        model.enable_multi_axis_checkpointing(2, 7)
    model(**packed_inputs(made)).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_one_sample_is_a_plain_row(model):
    ids, _, patches, grid = samples(torch.float32)[0]
    inputs = {"input_ids": ids, "pixel_values_videos": patches, "video_grid_thw": grid}
    torch.testing.assert_close(model(**inputs, packed_lengths=torch.tensor([7])).logits, model(**inputs).logits)


def test_wrong_lengths_are_named(model):
    inputs = packed_inputs(samples(torch.float32))
    with pytest.raises(ValueError, match=r"packed_lengths=\[3, 4\] must be positive and add up to one row.*1 x 30"):
        model(**inputs | {"packed_lengths": [3, 4]})
    with pytest.raises(ValueError, match="hold 4 .* 3 videos"):
        model(
            **inputs
            | {"video_grid_thw": inputs["video_grid_thw"][:3], "pixel_values_videos": media(*GRIDS[0], *GRIDS[2])[0]}
        )
