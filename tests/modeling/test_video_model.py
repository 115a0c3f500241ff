"""The chunked loss against transformers' own: value and gradients, whatever the chunks."""

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from vamba.modeling.video_model import chunked_causal_lm_loss


B, N, D, V = 3, 11, 8, 37


def inputs(dtype=torch.float64):
    head = nn.Linear(D, V, bias=False).to(dtype)
    hidden = torch.randn(B, N, D, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (B, N))
    labels[torch.rand(B, N) < 0.4] = -100
    labels[1] = -100  # a row that teaches nothing
    return head, hidden, labels


def plain(head, hidden, labels, items):
    logits = head(hidden)[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / ((labels[:, 1:] != -100).sum() if items is None else items)


@pytest.mark.parametrize("items", [None, 7, torch.tensor(19)])
@pytest.mark.parametrize("chunk", [1, 4, 1000, None])
def test_equals_the_plain_loss_and_gradients(items, chunk):
    head, hidden, labels = inputs()
    expected = plain(head, hidden, labels, items)
    wanted = torch.autograd.grad(expected, (hidden, head.weight))
    loss = chunked_causal_lm_loss(head, hidden, labels, V, num_items_in_batch=items, chunk_tokens=chunk)
    found = torch.autograd.grad(loss, (hidden, head.weight))
    assert torch.allclose(loss, expected, atol=1e-9, rtol=0)
    for got, want in zip(found, wanted):
        assert torch.allclose(got, want, atol=1e-9, rtol=0) and want.abs().max() > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("items", [None, 5])
def test_equals_transformers_loss(dtype, tolerance, items):
    head, hidden, labels = inputs(dtype)
    expected = ForCausalLMLoss(head(hidden), labels, V, num_items_in_batch=items)
    loss = chunked_causal_lm_loss(head, hidden, labels, V, num_items_in_batch=items, chunk_tokens=3)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=tolerance)


def test_never_holds_more_logits_than_a_chunk():
    head, hidden, labels = inputs()
    rows = []
    head.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    loss = chunked_causal_lm_loss(head, hidden, labels, V, chunk_tokens=4)
    targets = int((labels[:, 1:] != -100).sum())
    assert max(rows) == 4 and sum(rows) == targets
    loss.backward()
    assert max(rows) == 4 and sum(rows) == 2 * targets  # computed again, not kept


def test_nothing_to_predict():
    head, hidden, labels = inputs()
    labels[:] = -100
    loss = chunked_causal_lm_loss(head, hidden, labels, V, num_items_in_batch=3)
    assert loss == 0
    loss.backward()  # as a process whose batch has no target must be able to
    assert hidden.grad.abs().sum() == 0 and head.weight.grad.abs().sum() == 0
    assert chunked_causal_lm_loss(head, hidden, labels, V).isnan()  # as transformers' loss is


def test_another_ignored_label():
    head, hidden, labels = inputs()
    expected = plain(head, hidden, labels, None)
    assert torch.allclose(
        chunked_causal_lm_loss(head, hidden, labels.masked_fill(labels == -100, 3 - 10), V, ignore_index=-7), expected
    )


IDS = torch.randint(8, 90, (2, 5))


@pytest.mark.parametrize(
    "inputs, says",
    [
        ({"input_ids": IDS[:, :0]}, "at least one row and one token"),
        ({"input_ids": IDS[:0]}, "at least one row and one token"),
        ({"input_ids": IDS.float()}, "give integers"),
        ({"input_ids": IDS + 96}, "the model knows the tokens 0 to 95"),
        ({"input_ids": [[1]]}, "give a tensor"),
        ({"input_ids": IDS, "labels": IDS[:, :3]}, "labels are"),
        ({"input_ids": IDS, "labels": IDS + 96}, "labels hold"),
        ({"input_ids": IDS, "attention_mask": torch.ones(3, 5)}, "attention_mask is"),
        ({"input_ids": IDS[:1], "pixel_values": torch.zeros(16, 96), "image_grid_thw": torch.ones(1, 3)}, "integers"),
        (
            {"input_ids": IDS[:1], "pixel_values": torch.zeros(16, 95), "image_grid_thw": torch.tensor([[1, 4, 4]])},
            "95",
        ),
        (
            {"input_ids": IDS[:1], "pixel_values": torch.zeros(16, 96), "image_grid_thw": torch.tensor([[1, 1, 16]])},
            "mult",
        ),
    ],
)
def test_misuse_is_named(model, inputs, says):
    with pytest.raises(ValueError, match=says):
        model(**inputs)
    if "labels" not in inputs:
        with pytest.raises(ValueError, match=says):
            model.generate(**inputs, max_new_tokens=1)
