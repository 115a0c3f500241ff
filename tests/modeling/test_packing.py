"""Samples packed into one row: loss and every gradient are those of the samples by themselves."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DataCollatorWithFlattening

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


def varlen_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, scaling=None, **kwargs):
    """As flash attention has it: no mask, but samples that `cu_seq_lens_q` tells apart."""
    causal = kwargs.get("is_causal", module.is_causal) and query.shape[2] > 1
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    parts = zip(*(t.split(lengths if cu_seq_lens_q is not None else t.shape[2], dim=2) for t in (query, key, value)))
    outputs = [scaled_dot_product_attention(*part, is_causal=causal, scale=scaling, enable_gqa=True) for part in parts]
    return torch.cat(outputs, 2).transpose(1, 2), None


@pytest.mark.parametrize("positions", [None, torch.arange(30)[None]])
def test_attention_without_a_mask_keeps_samples_apart(positions):
    AttentionInterface.register("varlen_stand_in", varlen_attention)
    model, inputs = tiny_model(), packed_inputs(samples(torch.float32)) | {"position_ids": positions}
    expected = model(**inputs).logits
    model.set_attn_implementation("varlen_stand_in")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def flattened(lengths=(5, 1, 7), **options):
    rows = [prompt(length, seed=index)[0] for index, length in enumerate(lengths)]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)([{"input_ids": row} for row in rows])
    batch.pop("labels")
    return rows, batch


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen_stand_in"])
@pytest.mark.parametrize("form", ["2-D", "3 rows", "4 rows", "cu_seq_lens", "ones"])
def test_samples_that_a_collator_flattened_are_kept_apart(form, attention):
    model, told = tiny_model(), form == "cu_seq_lens"
    rows, batch = flattened(return_flash_attn_kwargs=told, return_position_ids=not told)
    if form.endswith("rows"):
        batch["position_ids"] = batch["position_ids"].expand(int(form[0]), 1, -1)
    if form == "ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = torch.cat([model(row[None]).logits for row in rows], 1)
    AttentionInterface.register("varlen_stand_in", varlen_attention)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_flattened_samples_see_their_own_media(model):
    made = samples(torch.float32)
    inputs = packed_inputs(made)
    lengths = inputs.pop("packed_lengths")
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    torch.testing.assert_close(model(**inputs, position_ids=positions).logits, separately(model, made)[1])


def test_what_cannot_be_kept_apart_is_refused(model):
    _, batch = flattened()
    with pytest.raises(ValueError, match="position_ids start anew within 2 of 2 rows.*packed_lengths"):
        model(batch["input_ids"].repeat(2, 1), position_ids=batch["position_ids"].repeat(2, 1))
    with pytest.raises(ValueError, match="without a cache: pass no past_key_values"):
        model(**batch, past_key_values=model.encode_video(*media((1, 4, 4))))


def test_padding_is_no_border(model):
    ids, mask = prompt(6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids[:, 2:]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, position_ids=positions).logits[:, 2:], expected)


def test_traced_samples_are_kept_apart(model):
    rows, batch = flattened()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = torch.cat([model(row[None]).logits for row in rows], 1)
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
